"""The coordinator brings a job to its end, tells what happens, and keeps what has to be kept."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.messages import Committed, Entered, Event, Failed, Failure
from cluster.policy import Limits
from cluster.topology import Handoff
from cluster.trace import overlaps
from pipeline.errors import RunStopped, StageFailed, StorageError
from pipeline.ledger import Ledger
from tests.cluster.fake_job import FakeJob, make_job, make_topology
from tests.cluster.fake_ledger import MemoryLedger, make_commit
from tests.cluster.fake_runtime import FakeRuntime
from tests.pipeline.test_ledger import HEADER


def never() -> bool:
    return False


def run_until(job: FakeJob, when: Callable[[], bool]) -> None:
    """Let the job run until something is so."""
    job.coordinator.step(0.0)
    while not when():
        job.coordinator.step(0.5)


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_a_job_ends_with_every_block_in_the_ledger(tmp_path: Path, handoff: Handoff) -> None:
    job = make_job(make_topology([2, 1, 3], replicas=2, handoff=handoff), Ledger.open(tmp_path, HEADER))
    job.coordinator.run_to_end(never)
    job.check_the_end()
    again = Ledger.read(tmp_path)
    assert again.commits == {block: make_commit(block) for block in range(6)}
    assert again.notes == {f"propagate.{block}": 0.5 for block in range(6)}


def test_progress_is_told_from_beginning_to_end() -> None:
    job = make_job(make_topology([1, 1], replicas=2), MemoryLedger())
    job.coordinator.run_to_end(never)
    calls = [call for call in job.told.calls if call[0] != "phase"]
    assert calls == [
        ("begin", "prune", 2, 0),
        ("advance", 0, "stage 0: error 0.2500, 1.5 s"),
        ("advance", 1, "stage 1: error 0.2500, 1.5 s"),
        ("end",),
    ]
    phases = [call[1:] for call in job.told.calls if call[0] == "phase" and call[1] == 1]
    names = ["read", "collect", "prune", "commit", "propagate"]
    assert phases == [(1, f"stage 1: {name}") for name in names]


def test_a_job_with_nothing_left_to_do_starts_nothing() -> None:
    job = make_job(make_topology([1, 1]), MemoryLedger(range(2)))
    job.coordinator.run_to_end(never)
    assert (job.runtime.starts, job.told.calls) == ([], [])


def test_neighbours_overlap_at_the_handoff_and_all_stages_prune_at_once_after_a_dense_one() -> None:
    exact, dense = (make_job(make_topology([3, 3, 3], handoff=h), MemoryLedger()) for h in ("pruned", "dense"))
    for job in (exact, dense):
        job.coordinator.run_to_end(never)
        assert {span.phase for span in job.coordinator.spans} >= {"read", "collect", "prune", "commit", "propagate"}
    assert max(overlaps(exact.coordinator.spans, ["prune"]).at_once) == 1
    assert min(overlaps(exact.coordinator.spans).handing_on.values()) > 0
    assert max(overlaps(dense.coordinator.spans).at_once) == 3


def test_a_resumed_job_tells_where_it_goes_on_and_what_is_done_again() -> None:
    ledger = MemoryLedger(range(3))
    job = make_job(make_topology([2, 2, 2]), ledger)
    job.coordinator.run_to_end(never)
    job.check_the_end()
    assert ledger.notes["recovery.1"] == {
        "cause": "3 of 6 blocks are committed; going on from there",
        "redone": [
            "stage 0 has nothing left to do: blocks 0-1 are committed",
            "stage 1 starts: input rebuilt by running blocks 0-1, replays block 2, prunes on from 3",
            "stage 2 starts: input sent by stage 1, prunes on from 4",
        ],
    }
    assert job.told.said[1:] == ledger.notes["recovery.1"]["redone"]
    first, second = job.runtime.starts
    assert (first.committed.keys(), second.committed.keys()) == ({0, 1, 2}, set())


def test_a_dense_stage_is_given_the_commits_of_its_own_blocks_only() -> None:
    ledger = MemoryLedger(range(3))
    job = make_job(make_topology([2, 2], handoff="dense"), ledger)
    job.coordinator.run_to_end(never)
    assert [start.committed.keys() for start in job.runtime.starts] == [{2}]


def test_one_stage_dies_and_only_that_one_starts_again() -> None:
    job = make_job(make_topology([2, 2, 2], replicas=3), MemoryLedger())
    run_until(job, lambda: 2 in job.ledger.commits)
    job.runtime.kill(1)
    run_until(job, lambda: job.coordinator.state.is_done)
    job.check_the_end()
    assert job.ledger.notes["recovery.1"] == {
        "cause": "stage 1 replicas 0-2: worker died: killed by signal 9",
        "redone": [
            "stage 1 starts again (attempt 2): input rebuilt by running blocks 0-1, replays block 2, prunes on from 3"
        ],
    }
    assert [start.stage for start in job.runtime.starts] == [0, 1, 2, 1]


def test_stages_lost_together_are_told_together() -> None:
    topology = make_topology([1, 1, 1], replicas=2, handoff="dense")
    job = make_job(topology, MemoryLedger(), nodes=[6, 0], delays=(0.0, 0.2, 0.4), seed=1)
    run_until(job, lambda: all(stage.status == "running" for stage in job.coordinator.state.stages))
    job.runtime.take_node(0)
    job.runtime.add_node(1, 6)
    run_until(job, lambda: job.coordinator.state.is_done)
    job.check_the_end()
    cause = "stage 0 replicas 0-1; stage 1 replicas 0-1; stage 2 replicas 0-1: node 0 was lost"
    assert [said for said in job.told.said if "lost" in str(said)] == [cause]
    note = job.ledger.notes["recovery.1"]
    assert note == {
        "cause": cause,
        "redone": [
            "stage 0 starts again (attempt 2): input embedded, prunes on from 0",
            "stage 1 starts again (attempt 2): input sent by stage 0, prunes on from 1",
            "stage 2 starts again (attempt 2): input sent by stage 1, prunes on from 2",
        ],
    }


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_a_job_shrinks_to_the_places_there_are(handoff: Handoff) -> None:
    for places in (2, 3, 4, 5):
        topology = make_topology([1, 2, 1, 2], replicas=2, handoff=handoff)
        job = make_job(topology, MemoryLedger(), nodes=[places], seed=places)
        job.coordinator.run_to_end(never)
        job.check_the_end()
        job.check_recoveries()


def test_a_commit_that_arrives_twice_is_written_once_and_acknowledged_twice() -> None:
    job = make_job(make_topology([2]), MemoryLedger())
    run_until(job, lambda: 0 in job.ledger.commits)
    answers = job.runtime.workers[0].answers
    answers.clear()
    job.runtime._on_the_way.append((job.runtime.now(), Committed(stage=0, attempt=1, commit=make_commit(0))))
    job.coordinator.step(0.0)
    assert answers == {0: True}
    assert [call[1] for call in job.told.calls if call[0] == "advance"] == [0]


def test_a_commit_of_an_attempt_that_is_over_is_ignored() -> None:
    job = make_job(make_topology([2]), MemoryLedger())
    run_until(job, lambda: job.coordinator.state.stages[0].status == "running")
    job.runtime.kill(0)
    run_until(job, lambda: job.coordinator.state.stages[0].attempt == 2)
    job.runtime._on_the_way.append((job.runtime.now(), Committed(stage=0, attempt=1, commit=make_commit(1))))
    job.coordinator.step(0.0)
    assert not job.ledger.commits


def test_a_ledger_that_cannot_be_written_ends_the_job_before_the_acknowledgement(tmp_path: Path) -> None:
    job = make_job(make_topology([2]), Ledger.open(tmp_path, HEADER))
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(StorageError, match=r"cannot append to .*ledger\.jsonl"):
        job.coordinator.run_to_end(never)
    assert not job.runtime.workers
    assert not job.ledger.commits


def test_a_fatal_failure_ends_the_job_with_what_it_was_and_how_to_go_on() -> None:
    def fail(runtime: FakeRuntime, event: Event) -> None:
        if isinstance(event, Committed) and event.commit.block == 3:
            runtime.kill(1, "block 3: hidden states hold NaN", fatal=True)

    job = make_job(make_topology([2, 2, 2], replicas=2), MemoryLedger(), disturb=fail)
    with pytest.raises(
        StageFailed,
        match=r"^stage 1 replicas 0-1: block 3: hidden states hold NaN\nAnother attempt would end the same way\.\n"
        r"4 of 6 blocks are committed in runs/x\. Go on with: secateur run runs/x$",
    ):
        job.coordinator.run_to_end(never)
    assert not job.runtime.workers
    assert job.told.said == []  # the error tells, once


def test_a_stage_that_always_dies_ends_the_job() -> None:
    def fail(runtime: FakeRuntime, event: Event) -> None:
        if event.stage == 1 and not isinstance(event, Failed):
            runtime.kill(1, "out of memory")

    job = make_job(make_topology([1, 1]), MemoryLedger(), limits=Limits(max_restarts=2), disturb=fail)
    expected = r"stage 1 died 3 times without a new commit in between \(at most 2 restarts\); the last time of this:\n"
    with pytest.raises(StageFailed, match=expected + r"stage 1 replica 0: out of memory\n\d of 2 blocks"):
        job.coordinator.run_to_end(never)
    assert not job.runtime.workers


def test_a_cluster_without_room_ends_the_job_with_the_numbers() -> None:
    limits = Limits(patience=30.0, give_up_after=120.0, resources="1 GPU")
    job = make_job(make_topology([1, 1], replicas=3), MemoryLedger(), nodes=[1, 1], limits=limits)
    expected = r"for 2 min 0 s there was no place for stages 0-1 of 2\. A stage asks for 3 replicas of 1 GPU at once"
    with pytest.raises(StageFailed, match=expected):
        job.coordinator.run_to_end(never)
    assert not job.runtime.workers


def test_a_stop_lets_the_block_at_hand_come_to_its_commit() -> None:
    job = make_job(make_topology([3, 3]), MemoryLedger(), delays=[0.0])
    with pytest.raises(
        RunStopped, match=r"^stopped as asked: 2 of 6 blocks are committed in runs/x\. Go on with: secateur run runs/x$"
    ):
        job.coordinator.run_to_end(lambda: any(event.block == 1 for event in job.entered("prune")))
    assert not job.runtime.workers
    assert [event.block for event in job.entered("propagate")] == [0]
    assert job.told.said == []


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_every_phase_that_was_entered_is_a_span_until_it_or_its_stage_ends(handoff: Handoff) -> None:
    evictions = 0
    for seed in range(4):
        topology = make_topology([2, 2, 2, 2], handoff=handoff)
        job = make_job(topology, MemoryLedger(), nodes=[2], delays=[0.0], seed=seed)
        job.runtime.plan(20.0, partial(job.runtime.kill, 0))
        job.coordinator.run_to_end(never)
        entered = [(e.stage, e.block, e.phase, e.at) for e in job.runtime.happened if isinstance(e, Entered)]
        spans = job.coordinator.spans
        assert sorted((span.stage, span.block, span.phase, span.start) for span in spans) == sorted(entered)
        assert max(overlaps(spans, {span.phase for span in spans}).at_once) == 2  # there is no more room
        evictions += sum("which comes before it" in str(said) for said in job.told.said)
    assert evictions > 0


def test_the_time_without_a_place_is_counted_from_when_something_last_ran() -> None:
    job = make_job(make_topology([20]), MemoryLedger(), nodes=[1], limits=Limits(give_up_after=30.0))
    job.runtime.plan(60.0, lambda: job.runtime.take_node(0))
    job.runtime.plan(80.0, lambda: job.runtime.add_node(0, 1))
    job.coordinator.run_to_end(never)
    job.check_the_end()
    assert job.deaths()


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_a_stage_whose_input_was_lost_on_the_way_rebuilds_it(handoff: Handoff) -> None:
    def lose(runtime: FakeRuntime, event: Event) -> None:
        before = runtime.workers.get(0)
        if before is not None and event.stage == 1 and event.attempt == 1:
            before.target = None

    job = make_job(make_topology([2, 2, 2], handoff=handoff), MemoryLedger(), disturb=lose)
    job.coordinator.run_to_end(never)
    job.check_the_end()
    job.check_recoveries()
    assert "stage 1 gives way: stage 0 has finished, and part of its output never came" in job.told.said


def test_failures_tell_their_stage_even_when_no_place_was_found_yet() -> None:
    job = make_job(make_topology([1]), MemoryLedger(), nodes=[0])
    job.coordinator.step(0.0)
    died = Failure(replica=0, message="the environment cannot be set up", fatal=False)
    job.runtime._end(job.runtime.workers[0])
    job.runtime._happen(Failed(stage=0, attempt=1, failures=(died,)))
    job.runtime.add_node(0, 1)
    run_until(job, lambda: job.coordinator.state.is_done)
    job.check_the_end()
    job.check_recoveries()
