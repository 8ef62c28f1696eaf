"""What a topology costs: two jobs worked out by hand, and laws that hold for every job."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.forecast import Forecast, Links, Span, forecast
from cluster.job_shape import BlockCost, JobShape
from cluster.topology import Handoff, Topology

BLOCK = BlockCost(read=1, collect=4, prune=3, commit=2, propagate=4, dense_forward=2, weight_bytes=7)
JOB = JobShape(blocks=(BLOCK, BLOCK), num_sequences=2, batch=1, boundary_bytes=20)
LINKS = Links(handoff_bytes_per_s=10, allreduce_bytes_per_s=10)
INSTANT = Links(handoff_bytes_per_s=float("inf"), allreduce_bytes_per_s=float("inf"))


def topology(handoff: Handoff, *lengths: int, replicas: int = 1) -> Topology:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return Topology(stages=tuple(range(a, b) for a, b in pairwise(bounds)), replicas=replicas, handoff=handoff)


def phases(expected: Forecast, stage: int) -> list[tuple[int, str, float, float]]:
    return [(s.block, s.phase, s.start, s.end) for s in expected.stage_spans if s.stage == stage]


def test_with_pruned_handoff_a_stage_collects_while_the_one_before_it_propagates() -> None:
    expected = forecast(JOB, topology("pruned", 1, 1), LINKS)
    assert phases(expected, 0) == [
        (0, "read", 0, 1), (0, "collect", 1, 5), (0, "prune", 5, 8), (0, "commit", 8, 10), (0, "propagate", 10, 14),
    ]  # fmt: skip
    # A batch takes 2 s to propagate, 1 s to arrive, 2 s to collect.
    assert phases(expected, 1) == [
        (1, "read", 0, 1),
        (1, "collect", 13, 17),
        (1, "prune", 17, 20),
        (1, "commit", 20, 22),
    ]
    assert (expected.seconds, expected.seconds_alone, expected.handoff_bytes) == (22, 24, 20)
    assert expected.speed_up == 24 / 22


def test_with_dense_handoff_all_stages_prune_at_once() -> None:
    expected = forecast(JOB, topology("dense", 1, 1), LINKS)
    assert phases(expected, 0) == [
        (0, "dense", 0, 3), (0, "read", 3, 4), (0, "collect", 4, 8), (0, "prune", 8, 11), (0, "commit", 11, 13),
    ]  # fmt: skip
    # Batches take 1 s to run through the block, 1 s to arrive.
    assert phases(expected, 1) == [
        (1, "dense", 3, 4), (1, "read", 4, 5), (1, "collect", 5, 9), (1, "prune", 9, 12), (1, "commit", 12, 14),
    ]  # fmt: skip
    assert (expected.seconds, expected.handoff_bytes, expected.read_bytes) == (14, 20, 21)


def test_replicas_divide_the_sequences_and_add_up_what_they_know() -> None:
    block = replace(BLOCK, statistics_bytes=10, solved_bytes=4)
    job = replace(JOB, blocks=(block,), replicated=0.5, gradient_bytes=5, num_updates=2)
    expected = forecast(job, topology("pruned", 1, replicas=2), LINKS)
    # 10 bytes of statistics and 5 of one update pass a link of 10 bytes/s once, half of what is solved too: 1.7 s.
    assert phases(expected, 0) == [
        (0, "read", 0, 1), (0, "collect", 1, 3), (0, "prune", 3, pytest.approx(3 + 2.25 + 1.7)),
        (0, "commit", pytest.approx(6.95), pytest.approx(8.95)),
    ]  # fmt: skip
    assert expected.allreduce_bytes == 2 * (10 + 5) + 4
    assert expected.read_bytes == 2 * 7


def test_the_replica_with_most_batches_stands_for_all() -> None:
    expected = forecast(replace(JOB, num_sequences=3), topology("pruned", 2, replicas=2), INSTANT)
    collected = next(span for span in expected.stage_spans if span.phase == "collect")
    assert collected.end - collected.start == pytest.approx(4 * 2 / 3)


def test_a_stage_without_room_waits_and_makes_its_own_input() -> None:
    alone = forecast(JOB, topology("pruned", 1, 1), LINKS, at_once=1)
    assert phases(alone, 1)[0] == (0, "replay", 10, 15)
    assert (alone.seconds, alone.handoff_bytes, alone.read_bytes) == (25, 0, 21)
    dense = forecast(JOB, topology("dense", 1, 1), LINKS, at_once=1)
    assert phases(dense, 1)[0] == (1, "rebuild", 10, 13)
    assert (dense.seconds, dense.handoff_bytes) == (23, 0)


def test_a_dense_stream_beside_the_pruned_one_is_rebuilt_too() -> None:
    both = forecast(replace(JOB, needs_dense_stream=True), topology("pruned", 1, 1), LINKS, at_once=1)
    assert phases(both, 1)[0] == (0, "replay", 10, 18)


def test_stages_with_room_for_two_at_once_stream_as_if_there_were_room_for_all() -> None:
    job = replace(JOB, blocks=(BLOCK,) * 4)
    pruned = topology("pruned", 1, 1, 1, 1)
    assert forecast(job, pruned, LINKS, at_once=2).handoff_bytes == forecast(job, pruned, LINKS).handoff_bytes


def test_a_stage_too_large_to_hold_reads_its_weights_in_every_round() -> None:
    job = replace(JOB, blocks=(BLOCK,) * 4, num_sequences=10, dense_rounds=4, working_bytes=1)
    held = forecast(job, topology("dense", 2, 2), INSTANT)
    read_anew = forecast(replace(job, resident_bytes=13), topology("dense", 2, 2), INSTANT)
    assert (held.read_bytes, read_anew.read_bytes) == (7 * (4 + 2), 7 * (4 + 4 * 2))
    assert (held.device_bytes, read_anew.device_bytes) == ((14, 8), (8, 8))
    assert read_anew.seconds > held.seconds
    just_held = forecast(replace(job, resident_bytes=14), topology("dense", 2, 2), INSTANT)
    assert just_held == held


def test_memory_is_that_of_the_largest_block_and_of_the_hidden_states_of_one_replica() -> None:
    blocks = (BLOCK, replace(BLOCK, weight_bytes=9), BLOCK)
    job = JobShape(
        blocks=blocks,
        num_sequences=4,
        batch=1,
        boundary_bytes=40,
        num_boundaries=2,
        working_bytes=3,
        activation_bytes=5,
    )
    pruned = forecast(job, topology("pruned", 2, 1, replicas=2), LINKS)
    assert (pruned.device_bytes, pruned.host_bytes) == ((17, 15), (40, 40))
    assert pruned.worker_peak_bytes == (57, 55)
    dense = forecast(job, topology("dense", 2, 1), LINKS)
    assert (dense.device_bytes, dense.host_bytes) == ((21, 15), (80, 80))


def test_on_one_disk_replicas_and_stages_wait_for_each_other() -> None:
    expected = forecast(JOB, topology("pruned", 1, 1, replicas=2), replace(INSTANT, shared_disk=True))
    reads = [(span.start, span.end) for span in expected.stage_spans if span.phase == "read"]
    assert reads == [(0, 2), (2, 4)]


durations = st.floats(0.01, 10)
costs = st.builds(
    BlockCost,
    read=durations,
    collect=durations,
    prune=durations,
    commit=durations,
    propagate=durations,
    dense_forward=durations,
    weight_bytes=st.integers(1, 100),
    statistics_bytes=st.integers(0, 100),
    solved_bytes=st.integers(0, 100),
)
jobs = st.builds(
    JobShape,
    blocks=st.lists(costs, min_size=1, max_size=5).map(tuple),
    num_sequences=st.integers(1, 9),
    batch=st.integers(1, 3),
    boundary_bytes=st.integers(1, 1000),
    needs_dense_stream=st.booleans(),
    replicated=st.floats(0, 1),
    gradient_bytes=st.integers(0, 20),
    num_updates=st.integers(0, 5),
    resident_bytes=st.none() | st.integers(0, 300),
    dense_rounds=st.integers(1, 5),
)
rates = st.floats(1, 1e4)
links_of_all_kinds = st.builds(Links, handoff_bytes_per_s=rates, allreduce_bytes_per_s=rates, shared_disk=st.booleans())


@st.composite
def topologies(draw: st.DrawFn, job: JobShape, handoff: Handoff | None = None, replicas: int | None = None) -> Topology:
    num_blocks = len(job.blocks)
    cuts = draw(st.sets(st.integers(1, num_blocks - 1))) if num_blocks > 1 else set()
    return Topology(
        stages=tuple(range(a, b) for a, b in pairwise((0, *sorted(cuts), num_blocks))),
        replicas=replicas or draw(st.integers(1, min(3, job.num_batches))),
        handoff=handoff or draw(st.sampled_from(["pruned", "dense"])),
    )


def of(expected: Forecast, stage: int, chosen: Callable[[Span], bool]) -> list[Span]:
    return [span for span in expected.stage_spans if span.stage == stage and chosen(span)]


@given(jobs, links_of_all_kinds)
def test_one_worker_takes_the_plain_sum_less_outputs_nobody_needs(job: JobShape, links: Links) -> None:
    expected = forecast(job, topology("pruned", len(job.blocks)), links)
    assert expected.seconds == pytest.approx(sum(b.seconds for b in job.blocks) - job.blocks[-1].propagate)
    assert expected.speed_up == pytest.approx(1)
    assert expected.read_bytes == sum(block.weight_bytes for block in job.blocks)
    assert expected.handoff_bytes == expected.allreduce_bytes == 0


@given(jobs, links_of_all_kinds, st.none() | st.integers(1, 3), st.data())
def test_a_stage_does_one_thing_at_a_time_and_every_block_in_turn(
    job: JobShape, links: Links, at_once: int | None, data: st.DataObject
) -> None:
    chosen = data.draw(topologies(job))
    expected = forecast(job, chosen, links, at_once)
    for stage, blocks in enumerate(chosen.stages):
        own = of(expected, stage, lambda span: True)
        assert all(before.end <= after.start for before, after in pairwise(own))
        worked = [(s.block, s.phase) for s in own if s.phase not in ("read", "dense", "rebuild", "replay")]
        wanted = [(block, phase) for block in blocks for phase in ("collect", "prune", "commit", "propagate")]
        hands_on = expected.handoff_bytes > 0 and chosen.handoff == "pruned" and stage < chosen.num_stages - 1
        assert worked == (wanted if hands_on else wanted[:-1])
    assert expected.seconds == max(span.end for span in expected.stage_spans)


@given(jobs, links_of_all_kinds, st.data())
def test_a_stage_works_on_nothing_before_it_is_sent_and_nothing_is_sent_before_its_time(
    job: JobShape, links: Links, data: st.DataObject
) -> None:
    chosen = data.draw(topologies(job))
    expected = forecast(job, chosen, links)
    way = job.boundary_bytes / job.num_batches / links.handoff_bytes_per_s
    sends, takes = ("propagate", "collect") if chosen.handoff == "pruned" else ("dense", "dense")
    for stage in range(1, chosen.num_stages):
        sending = of(expected, stage - 1, lambda span: span.phase == sends)[-1]
        taking = of(expected, stage, lambda span: span.phase == takes)[0]
        assert taking.end >= sending.end + way
        if chosen.handoff == "pruned":
            assert taking.start >= sending.start + way
            assert sending.start >= of(expected, stage - 1, lambda span: span.phase == "commit")[-1].end


@given(jobs, st.data())
def test_pruned_stages_save_the_overlap_of_propagating_and_collecting_and_no_more(
    job: JobShape, data: st.DataObject
) -> None:
    links = Links(handoff_bytes_per_s=data.draw(rates), allreduce_bytes_per_s=1)
    expected = forecast(job, data.draw(topologies(job, "pruned", 1)), links)
    in_turn = job.blocks[0].collect + sum(block.prune + block.commit for block in job.blocks)
    overlapping = sum(max(before.propagate, after.collect) for before, after in pairwise(job.blocks))
    most = job.seconds_alone + expected.handoff_bytes / links.handoff_bytes_per_s
    assert in_turn + overlapping <= expected.seconds * (1 + 1e-9)
    assert expected.seconds <= most * (1 + 1e-9)


@given(jobs, st.data())
def test_dense_stages_take_the_pass_and_then_the_longest_stage_at_most(job: JobShape, data: st.DataObject) -> None:
    links = Links(handoff_bytes_per_s=data.draw(rates), allreduce_bytes_per_s=1)
    chosen = data.draw(topologies(job, "dense", 1))
    expected = forecast(job, chosen, links)
    work = [
        sum(job.blocks[block].seconds for block in blocks) - job.blocks[blocks[-1]].propagate
        for blocks in chosen.stages
    ]
    rounds = 1 if job.resident_bytes is None else job.dense_rounds
    passed = (
        sum(rounds * block.read + block.dense_forward for block in job.blocks[: chosen.stages[-1].start])
        + expected.handoff_bytes / links.handoff_bytes_per_s
    )
    assert max(work) <= expected.seconds * (1 + 1e-9)
    assert expected.seconds <= (passed + max(work)) * (1 + 1e-9)


@given(jobs, rates, rates, rates, st.data())
def test_more_bandwidth_is_never_slower(
    job: JobShape, slow: float, fast: float, other: float, data: st.DataObject
) -> None:
    slow, fast = sorted((slow, fast))
    chosen, at_once = data.draw(topologies(job)), data.draw(st.none() | st.integers(1, 3))

    def seconds(handoff: float, allreduce: float) -> float:
        links = Links(handoff_bytes_per_s=handoff, allreduce_bytes_per_s=allreduce)
        return forecast(job, chosen, links, at_once).seconds

    assert seconds(fast, other) <= seconds(slow, other) * (1 + 1e-9)
    assert seconds(other, fast) <= seconds(other, slow) * (1 + 1e-9)


@given(jobs, st.sampled_from(["read", "collect", "prune", "commit", "propagate", "dense_forward"]), st.data())
def test_a_block_that_takes_longer_never_ends_the_job_sooner(job: JobShape, phase: str, data: st.DataObject) -> None:
    chosen, place = data.draw(topologies(job)), data.draw(st.integers(0, len(job.blocks) - 1))
    changed = job.blocks[place]
    longer = replace(changed, **{phase: 2 * getattr(changed, phase)})
    slower = replace(job, blocks=(*job.blocks[:place], longer, *job.blocks[place + 1 :]))
    assert forecast(job, chosen, LINKS).seconds <= forecast(slower, chosen, LINKS).seconds * (1 + 1e-9)


@given(jobs, st.data())
def test_one_disk_for_all_is_never_quicker_than_all_that_it_does(job: JobShape, data: st.DataObject) -> None:
    chosen = data.draw(topologies(job))
    shared = forecast(job, chosen, replace(LINKS, shared_disk=True))
    busy = sum(span.end - span.start for span in shared.stage_spans if span.phase == "commit")
    busy += sum(chosen.replicas * block.read for block in job.blocks)
    assert shared.seconds >= busy * (1 - 1e-9)


@given(jobs, links_of_all_kinds, st.data())
def test_traffic_is_counted_to_the_byte(job: JobShape, links: Links, data: st.DataObject) -> None:
    chosen = data.draw(topologies(job))
    expected = forecast(job, chosen, links)
    streams = 2 if job.needs_dense_stream and chosen.handoff == "pruned" else 1
    assert expected.handoff_bytes == streams * job.boundary_bytes * (chosen.num_stages - 1)
    most_batches = -(-job.num_batches // chosen.replicas)
    updates = -(-job.num_updates * most_batches // job.num_batches)
    summed = sum(block.statistics_bytes + updates * job.gradient_bytes for block in job.blocks)
    sent = 2 * summed + sum(block.solved_bytes for block in job.blocks)
    assert expected.allreduce_bytes == (chosen.replicas - 1) * sent
    if chosen.handoff == "pruned":
        assert expected.read_bytes == chosen.replicas * sum(block.weight_bytes for block in job.blocks)
