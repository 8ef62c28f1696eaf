"""Events and decisions change a job's state as they should, and late events change nothing."""

from cluster.messages import Committed, Entered, Failed, Failure, Finished, Placed, Propagated, Received
from cluster.state import JobState, first_state, is_current, marked_done, released, started, take, tick
from cluster.topology import Handoff, Topology
from tests.cluster.fake_ledger import make_commit

KILLED = (Failure(replica=0, message="killed by signal 9", fatal=False),)


def make_job(committed: range = range(0), handoff: Handoff = "pruned") -> JobState:
    """Three stages of two blocks each."""
    topology = Topology(stages=(range(0, 2), range(2, 4), range(4, 6)), replicas=2, handoff=handoff)
    return first_state(topology, frozenset(committed), now=0.0)


def running(job: JobState, *stages: int, now: float = 0.0) -> JobState:
    """The job once some stages have their places; stage 0 makes its input, the others are sent theirs."""
    for stage in stages:
        job = started(job, stage, "stream" if stage else "rebuild", stage < 2, now)
        job = take(job, Placed(stage=stage, attempt=job.stages[stage].attempt, nodes=("a", "a")), now)
    return job


def committed(job: JobState, *blocks: int) -> JobState:
    for block in blocks:
        stage = block // 2
        job = take(job, Committed(stage=stage, attempt=job.stages[stage].attempt, commit=make_commit(block)), 0.0)
    return job


def dies(job: JobState, stage: int, now: float = 0.0) -> JobState:
    return take(job, Failed(stage=stage, attempt=job.stages[stage].attempt, failures=KILLED), now)


def test_a_stage_goes_from_waiting_over_placing_and_running_to_done() -> None:
    job = make_job()
    seen = [job.stages[0].status]
    job = started(job, 0, "rebuild", False, 1.0)
    seen.append(job.stages[0].status)
    for event in (Placed(stage=0, attempt=1, nodes=("a",)), Received(stage=0, attempt=1)):
        job = take(job, event, 2.0)
        seen.append(job.stages[0].status)
    job = take(committed(job, 0, 1), Finished(stage=0, attempt=1), 3.0)
    assert [*seen, job.stages[0].status] == ["waiting", "placing", "running", "running", "done"]
    assert (job.committed, job.stages[0].received) == ({0, 1}, True)
    assert not job.is_done
    assert marked_done(marked_done(job, 1), 2).is_done


def test_an_event_of_an_attempt_that_is_over_changes_nothing() -> None:
    again = running(dies(running(make_job(), 0), 0), 0)
    late = Committed(stage=0, attempt=1, commit=make_commit(0))
    assert not is_current(again, late)
    assert take(again, late, 9.0) is again
    gone = released(again, 0, 5.0)
    assert take(gone, Failed(stage=0, attempt=2, failures=KILLED), 9.0) is gone
    told = Propagated(stage=0, attempt=2, block=0, seconds=1.0)
    assert take(again, told, 9.0) == again


def test_a_stage_that_finishes_before_its_last_commit_has_stopped_and_waits() -> None:
    job = committed(running(make_job(), 0).stop(), 0)
    assert job.stages[0].told_to_stop
    assert take(job, Finished(stage=0, attempt=1), 1.0).stages[0].status == "waiting"


def test_a_block_is_being_pruned_from_its_reading_to_its_commit() -> None:
    job, seen = running(make_job(), 0), {}
    for phase in ("replay", "read", "collect", "prune", "commit"):
        job = take(job, Entered(stage=0, attempt=1, replica=1, block=0, phase=phase, at=1.0), 1.0)
        seen[phase] = job.is_pruning(0)
    assert seen == {"replay": False, "read": True, "collect": True, "prune": True, "commit": True}
    assert not committed(job, 0).is_pruning(0)


def test_a_new_attempt_knows_nothing_of_the_one_before() -> None:
    job = take(running(make_job(), 0, 1), Received(stage=1, attempt=1), 0.0)
    job = take(job, Entered(stage=1, attempt=1, replica=0, block=2, phase="prune", at=1.0), 1.0)
    assert (job.stages[1].awaits, job.is_pruning(1)) == (False, True)
    job = dies(job, 1)
    assert job.stages[1].died == KILLED
    job = running(job, 1)
    assert (job.stages[1].awaits, job.is_pruning(1), job.stages[1].died) == (True, False, ())


def test_deaths_without_progress_are_counted_and_a_commit_begins_anew() -> None:
    job = dies(running(dies(running(make_job(), 0), 0), 0), 0)
    assert job.stages[0].restarts == 2
    job = dies(committed(running(job, 0), 0), 0)
    assert job.stages[0].restarts == 1
    assert dies(running(job, 0), 0).stages[0].restarts == 2


def test_received_input_is_progress_once_only() -> None:
    """A stage that dies each time right after it has received would never come to an end otherwise."""
    job = dies(running(make_job(), 0), 0)
    counts = [job.stages[0].restarts]
    for _ in range(3):
        job = dies(take(running(job, 0), Received(stage=0, attempt=job.stages[0].attempt + 1), 0.0), 0)
        counts.append(job.stages[0].restarts)
    assert counts == [1, 1, 2, 3]


def test_a_stage_that_only_waits_for_others_is_as_far_as_they_are() -> None:
    job = committed(dies(running(make_job(), 0, 1), 1), 0)
    assert dies(running(job, 1), 1).stages[1].restarts == 1
    dense = committed(dies(running(make_job(handoff="dense"), 0, 1), 1), 0)
    assert dies(running(dense, 1), 1).stages[1].restarts == 2


def test_releasing_a_stage_disconnects_the_one_before_it() -> None:
    job = released(running(make_job(), 0, 1), 1, 5.0)
    assert not job.stages[0].forward
    assert job.stages[1].status == "waiting"


def test_resources_given_back_let_everybody_look_for_a_place_anew() -> None:
    job = started(running(make_job(), 0, 1), 2, "stream", False, 1.0)
    assert released(job, 1, 7.0).stages[2].placing_since == 7.0
    assert take(committed(job, 0, 1), Finished(stage=0, attempt=1), 8.0).stages[2].placing_since == 8.0
    placing = started(running(make_job(), 0), 1, "stream", False, 1.0)
    assert released(placing, 1, 7.0).stages[1].placing_since == 1.0


def test_the_job_remembers_when_something_last_ran() -> None:
    assert tick(make_job(), 9.0).ran_at == 0.0
    assert tick(running(make_job(), 0), 9.0).ran_at == 9.0
