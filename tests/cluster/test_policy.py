"""Each decision, for a state made by hand: who starts with what input, who gives way, when it is over."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.messages import Entered, Failed, Failure, Finished, Placed, Received
from cluster.policy import Decision, Evict, GiveUp, Limits, MarkDone, Start, Stop, Withdraw, decide, pause
from cluster.state import JobState, marked_done, released, started, take
from cluster.topology import Handoff
from tests.cluster.test_state import committed, dies, make_job, running

LIMITS = Limits(max_restarts=3, patience=60.0, give_up_after=600.0, resources="1 GPU, 4 CPUs")


def asked(job: JobState, now: float = 0.0) -> Sequence[Decision]:
    return decide(job, now, LIMITS)


def rebuild(stage: int, forward: bool) -> Start:
    return Start(stage=stage, input="rebuild", forward=forward)


def stream(stage: int, forward: bool) -> Start:
    return Start(stage=stage, input="stream", forward=forward)


def finished(job: JobState, stage: int) -> JobState:
    return take(job, Finished(stage=stage, attempt=job.stages[stage].attempt), 0.0)


def received(job: JobState, stage: int) -> JobState:
    return take(job, Received(stage=stage, attempt=job.stages[stage].attempt), 0.0)


def enters(job: JobState, stage: int, block: int, phase: str) -> JobState:
    attempt = job.stages[stage].attempt
    return take(job, Entered(stage=stage, attempt=attempt, replica=0, block=block, phase=phase, at=0.0), 0.0)


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_a_fresh_job_starts_all_stages_each_sending_to_the_next(handoff: Handoff) -> None:
    assert asked(make_job(handoff=handoff)) == [rebuild(0, True), stream(1, True), stream(2, False)]


@pytest.mark.parametrize(("num_committed", "start"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_a_resumed_job_starts_at_the_first_block_to_do(num_committed: int, start: int) -> None:
    job = make_job(range(num_committed))
    assert list(asked(job) if start else []) == [MarkDone(stage=stage) for stage in range(start)]
    for stage in range(start):
        job = marked_done(job, stage)
    assert asked(job) == [rebuild(start, start < 2), *(stream(later, later < 2) for later in range(start + 1, 3))]


def test_a_resumed_dense_job_starts_only_incomplete_stages() -> None:
    job = replace(make_job(handoff="dense"), committed=frozenset({2, 3, 4}))
    assert asked(job) == [MarkDone(stage=1)]
    assert asked(marked_done(job, 1)) == [rebuild(0, False), rebuild(2, False)]
    job = replace(job, committed=frozenset({0, 1, 3, 5}))
    assert asked(marked_done(job, 0)) == [rebuild(1, True), stream(2, False)]


def test_a_job_with_everything_committed_starts_nothing() -> None:
    job = make_job(range(6))
    assert asked(job) == [MarkDone(stage=0), MarkDone(stage=1), MarkDone(stage=2)]
    for stage in range(3):
        job = marked_done(job, stage)
    assert asked(job) == ()
    assert asked(job.stop()) == ()


def test_batches_can_be_had_until_the_last_block_before_is_committed() -> None:
    job = dies(running(make_job(), 0, 1, 2), 1)
    assert asked(committed(job, 0), now=1.0) == [stream(1, True)]
    assert asked(committed(job, 0, 1), now=1.0) == [rebuild(1, True)]


def test_a_stage_whose_connection_was_cut_waits_until_it_can_rebuild() -> None:
    job = released(running(make_job(), 0, 1, 2), 1, 0.0)
    assert asked(committed(job, 0)) == []
    assert asked(committed(job, 0, 1)) == [rebuild(1, True)]


def test_a_dense_stage_that_died_makes_its_input_and_sends_it_only_to_one_that_waits() -> None:
    job = dies(running(make_job(handoff="dense"), 0, 1, 2), 1)
    assert asked(job, now=1.0) == [rebuild(1, True)]
    assert asked(received(job, 2), now=1.0) == [rebuild(1, False)]


def test_neighbours_that_died_one_after_the_other_start_together() -> None:
    job = dies(dies(running(make_job(handoff="dense"), 0, 1, 2), 1, now=0.0), 2, now=0.9)
    assert asked(job, now=0.9) == []
    assert asked(job, now=1.0) == [rebuild(1, True), stream(2, False)]


def test_a_stage_that_died_after_its_last_commit_sends_again_while_the_next_one_waits() -> None:
    job = committed(running(make_job(), 0, 1, 2), 0, 1)
    assert asked(dies(job, 0), now=1.0) == [rebuild(0, True)]
    assert asked(dies(received(job, 1), 0)) == [MarkDone(stage=0)]
    both = dies(dies(job, 0), 1)
    assert asked(both, now=1.0) == [MarkDone(stage=0)]
    assert asked(marked_done(both, 0), now=1.0) == [rebuild(1, True)]


def test_a_stage_that_was_to_send_again_is_withdrawn_once_nobody_waits() -> None:
    job = dies(committed(running(make_job(), 0, 1, 2), 0, 1), 0)
    job = started(job, 0, "rebuild", True, 1.0)
    assert asked(dies(job, 1)) == [Withdraw(stage=0, why="nothing is left for it to do")]


def test_pauses_double_up_to_the_longest() -> None:
    assert [pause(restarts, LIMITS) for restarts in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert pause(5000, LIMITS) == 30
    job = dies(running(dies(running(make_job(), 0), 0), 0), 0, now=100.0)
    assert asked(job, now=101.9) == []
    assert asked(job, now=102.0) == [rebuild(0, True), stream(1, True), stream(2, False)]


def test_a_stage_that_dies_again_and_again_ends_the_job() -> None:
    job = make_job()
    for _ in range(3):
        job = dies(running(job, 0), 0)
        assert not any(isinstance(decision, GiveUp) for decision in asked(job))
    (decision,) = asked(dies(running(job, 0), 0))
    assert decision == GiveUp(
        message="stage 0 died 4 times without a new commit in between (at most 3 restarts); the last time of this:\n"
        "stage 0 replica 0: killed by signal 9"
    )


def test_a_stage_with_nothing_left_to_do_may_die_as_often_as_it_likes() -> None:
    job = dies(running(make_job(range(6)), 0), 0)
    assert decide(job, 0.0, Limits(max_restarts=0)) == [MarkDone(stage=index) for index in range(3)]


def test_a_failure_that_would_come_again_ends_the_job_and_is_told_once_for_all() -> None:
    nan = tuple(Failure(replica=rank, message="block 0: NaN in q_proj", fatal=True) for rank in range(2))
    lost = Failure(replica=1, message="lost", fatal=False)
    job = running(make_job(), 0, 1)
    job = take(job, Failed(stage=0, attempt=1, failures=nan), 0.0)
    job = take(job, Failed(stage=1, attempt=1, failures=(nan[0], lost)), 0.0)
    message = "stage 0 replicas 0-1; stage 1 replica 0: block 0: NaN in q_proj\nAnother attempt would end the same way."
    assert asked(job) == [GiveUp(message=message)]
    assert asked(job.stop()) == [GiveUp(message=message)]


def test_a_place_is_taken_from_the_last_stage_that_can_do_nothing() -> None:
    job = started(running(make_job(), 1, 2), 0, "rebuild", True, 10.0)
    assert asked(job, now=69.9) == []
    why = "stage 0, which comes before it, found no place for 1 min 0 s"
    assert asked(job, now=70.0) == [Evict(stage=2, why=why)]


def test_no_place_is_taken_from_an_earlier_stage() -> None:
    job = started(started(running(make_job(), 1), 0, "rebuild", True, 500.0), 2, "stream", False, 0.0)
    assert asked(job, now=500.0) == []


def test_no_place_is_taken_from_a_stage_that_works_or_is_being_sent_batches() -> None:
    job = received(running(make_job(handoff="dense"), 1, 2), 1)
    assert asked(started(job, 0, "rebuild", True, 0.0), now=60.0) == []
    rebuilding = take(
        started(make_job(handoff="dense"), 1, "rebuild", False, 0.0), Placed(stage=1, attempt=1, nodes=("a", "a")), 0.0
    )
    assert asked(started(started(rebuilding, 0, "rebuild", False, 0.0), 2, "rebuild", False, 0.0), now=60.0) == []


def test_a_stage_without_a_place_is_withdrawn_once_batches_wait_for_it() -> None:
    job = started(running(make_job(), 0), 1, "stream", True, 0.0)
    job = started(job, 2, "stream", False, 0.0)
    assert asked(committed(job, 0), now=500.0) == []
    why = "it found no place for 8 min 20 s, and stage 0 has batches for it"
    assert asked(committed(job, 0, 1), now=500.0) == [Withdraw(stage=1, why=why)]
    dense = started(running(make_job(handoff="dense"), 0), 1, "stream", True, 440.0)
    assert asked(started(dense, 2, "stream", False, 440.0), now=500.0)[0].stage == 1


def test_a_stage_whose_input_was_lost_on_the_way_makes_it_again() -> None:
    job = finished(committed(running(make_job(), 0, 1), 0, 1), 0)
    assert asked(job, now=59.0) == [Start(stage=2, input="stream", forward=False)]
    why = "stage 0 has finished, and part of its output never came"
    assert asked(job, now=60.0) == [Evict(stage=1, why=why)]
    assert asked(received(job, 1), now=60.0) == [Start(stage=2, input="stream", forward=False)]
    placing = started(released(job, 1, 0.0), 1, "stream", False, 50.0)
    assert asked(placing, now=60.0) == [Withdraw(stage=1, why=why)]
    assert asked(released(placing, 1, 60.0), now=60.0)[0] == rebuild(1, True)


def test_when_nothing_finds_a_place_the_job_ends_with_the_numbers() -> None:
    job = make_job()
    for index, decision in enumerate(asked(job)):
        job = started(job, index, decision.input, decision.forward, 0.0)
    assert asked(job, now=599.0) == []
    assert asked(job, now=600.0) == [
        GiveUp(
            message="nothing runs, and for 10 min 0 s there was no place for stages 0-2 of 3. A stage asks for 2 "
            "replicas of 1 GPU, 4 CPUs at once; one stage at a time is enough: add nodes, or ask for fewer replicas "
            "or for less"
        )
    ]
    (decision,) = decide(job, 600.0, Limits())
    assert "asks for 2 replicas at once" in decision.message


def test_a_long_pause_before_a_restart_is_no_lack_of_room() -> None:
    job = dies(running(make_job(), 0), 0)
    assert decide(job, 0.9, Limits(give_up_after=0.5)) == []


def test_a_stop_ends_what_would_be_done_again_and_lets_a_block_come_to_its_commit() -> None:
    job = started(running(make_job(handoff="dense"), 0, 1), 2, "stream", False, 0.0)
    job = enters(enters(received(received(job, 0), 1), 0, 0, "collect"), 1, 2, "propagate").stop()
    why = "a stop was asked for"
    assert asked(job) == [Evict(stage=1, why=why), Withdraw(stage=2, why=why)]
    job = released(released(job, 1, 0.0), 2, 0.0)
    assert asked(job) == []
    job = committed(job, 0)
    assert asked(job) == []  # it has been told, and will finish
    assert asked(finished(job, 0)) == [Stop()]
    assert asked(dies(job, 0)) == [Stop()]


def test_a_stop_does_not_wait_for_a_block_whose_input_no_longer_comes() -> None:
    job = committed(running(make_job(), 0, 1), 0, 1)
    job = enters(enters(job, 0, 1, "propagate"), 1, 2, "collect").stop()
    why = "a stop was asked for"
    assert asked(job) == [Evict(stage=0, why=why), Evict(stage=1, why=why)]


def test_a_stop_comes_before_giving_up() -> None:
    job = make_job()
    for _ in range(4):
        job = dies(running(job, 0), 0)
    assert asked(job.stop(), now=1e6) == [Stop()]


def test_a_stop_before_the_beginning_starts_nothing() -> None:
    assert asked(make_job().stop()) == [Stop()]


@pytest.mark.parametrize("wrong", [{"max_restarts": -1}, {"patience": 0.0}, {"give_up_after": 0.0}])
def test_limits_leave_time_for_something_to_happen(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Limits(**wrong)
