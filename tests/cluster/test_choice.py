"""How many stages and replicas: as asked or by forecast, what is refused, and what the user is told."""

from dataclasses import replace

import pytest

from cluster.choice import Resources, choose
from cluster.forecast import Links, forecast
from cluster.job_shape import BlockCost, JobShape
from cluster.topology import Topology
from pipeline.errors import ConfigError

BLOCK = BlockCost(
    read=0.1, collect=1, prune=2, commit=0.1, propagate=1, dense_forward=1, weight_bytes=10**9, statistics_bytes=10**9
)
JOB = JobShape(
    blocks=(BLOCK,) * 12, num_sequences=32, batch=1, boundary_bytes=10**9, working_bytes=10**9, activation_bytes=10**8
)
LINKS = Links(handoff_bytes_per_s=1e10, allreduce_bytes_per_s=1e10)
ROOM = Resources(num_slots=8)


def explained(lines: list[str], word: str) -> str:
    (line,) = [line for line in lines if line.startswith(word)]
    return line


def test_what_was_asked_is_taken_and_its_forecast_told() -> None:
    topology, expected, lines = choose(3, 2, "dense", ROOM, JOB, LINKS)
    assert topology == Topology(stages=(range(0, 4), range(4, 8), range(8, 12)), replicas=2, handoff="dense")
    assert expected == forecast(JOB, topology, LINKS)
    assert lines[0] == "3 stages of 4 blocks x 2 replicas, handoff dense; there is room for 8 workers"
    assert explained(lines, "expected") == (
        f"expected: {expected.seconds:.3g} s, {expected.speed_up:.3g} times as fast as one worker (49.4 s)"
    )
    assert explained(lines, "traffic") == (
        "traffic: 2 GB from stage to stage, 24 GB between replicas, 40 GB of weights read"
    )
    assert explained(lines, "memory") == ("memory of a worker: 4.1 GB where blocks run, 0.5 GB of hidden states")
    assert len(lines) == 4


def test_one_of_each_is_told_in_the_singular() -> None:
    _, _, lines = choose(1, 1, "pruned", Resources(num_slots=1), JOB, LINKS)
    assert lines[0] == "1 stage of 12 blocks x 1 replica, handoff pruned; there is room for 1 worker"
    assert explained(lines, "expected") == "expected: 49.4 s"


def test_stages_of_unlike_lengths_are_told_by_the_shortest_and_the_longest() -> None:
    _, _, lines = choose(5, 1, "pruned", ROOM, JOB, LINKS)
    assert lines[0].startswith("5 stages of 2 to 3 blocks x 1 replica, ")


def test_auto_takes_as_many_pruned_stages_as_there_is_room_for_where_that_is_faster() -> None:
    topology, expected, lines = choose("auto", 1, "pruned", ROOM, JOB, LINKS)
    assert topology.num_stages == 8
    assert expected.speed_up > 1.02
    line = explained(lines, "stages")
    assert line.startswith("stages: auto takes the fewest within 2% of the fastest (1: 49.4 s, 8: ")
    assert line.endswith("with handoff pruned each waits for the one before it")


def test_auto_takes_one_pruned_stage_where_more_save_less_than_2_percent() -> None:
    slow = replace(BLOCK, prune=200.0)
    topology, _, _ = choose("auto", 1, "pruned", ROOM, replace(JOB, blocks=(slow,) * 12), LINKS)
    assert topology.num_stages == 1


def test_auto_takes_the_fewest_dense_stages_whose_longest_is_as_short_as_can_be() -> None:
    topology, expected, lines = choose("auto", 1, "dense", ROOM, JOB, LINKS)
    assert topology.num_stages == 6  # 8 would leave the longest stage at 2 blocks, as 6 do
    assert expected.speed_up > 3
    eight = choose(8, 1, "dense", ROOM, JOB, LINKS)[1]
    assert explained(lines, "stages") == (
        f"stages: auto takes the fewest within 2% of the fastest (1: 49.4 s, 6: {expected.seconds:.3g} s, "
        f"8: {eight.seconds:.3g} s); with handoff dense all prune at once"
    )
    assert choose("auto", 1, "dense", Resources(num_slots=100), JOB, LINKS)[0].num_stages == 12


def test_auto_takes_one_dense_stage_where_handing_on_takes_longer_than_pruning() -> None:
    crawling = replace(LINKS, handoff_bytes_per_s=1e6)
    assert choose("auto", 1, "dense", ROOM, JOB, crawling)[0].num_stages == 1


def test_stages_are_balanced_by_what_their_blocks_cost() -> None:
    heavy = replace(BLOCK, prune=20.0)
    topology, _, _ = choose(2, 1, "dense", ROOM, replace(JOB, blocks=(heavy, *JOB.blocks[1:])), LINKS)
    assert [len(stage) for stage in topology.stages] == [4, 8]


def test_auto_never_takes_replicas_but_says_what_they_would_give() -> None:
    topology, _, lines = choose(2, "auto", "pruned", ROOM, JOB, LINKS)
    assert topology.replicas == 1
    four = forecast(JOB, replace(topology, replicas=4), LINKS)
    assert explained(lines, "replicas") == (
        "replicas: auto takes 1, because more change the result (rounding of Gram matrices, updates of besa); with "
        f"cluster.replicas: 4 it would take {four.seconds:.3g} s"
    )


def test_auto_says_nothing_of_replicas_there_is_no_room_for() -> None:
    _, _, lines = choose(8, "auto", "pruned", ROOM, JOB, LINKS)
    assert explained(lines, "replicas").endswith("updates of besa)")


def test_stages_without_room_take_turns_and_the_forecast_knows() -> None:
    topology, expected, lines = choose(4, 2, "dense", Resources(num_slots=2), JOB, LINKS)
    assert topology.num_workers == 8
    assert expected == forecast(JOB, topology, LINKS, at_once=1)
    assert expected.seconds > choose(4, 2, "dense", ROOM, JOB, LINKS)[1].seconds
    assert explained(lines, "1 of") == (
        "1 of 4 stages run at the same time, for lack of room; later ones that were not sent their input make it by "
        "running all blocks before their own"
    )


def test_dense_stages_hold_no_more_weights_than_half_of_the_memory() -> None:
    _, expected, _ = choose(2, 1, "dense", Resources(num_slots=2, device_bytes=8 * 10**9), JOB, LINKS)
    assert max(expected.device_bytes) == 2.1e9
    _, roomy, _ = choose(2, 1, "dense", Resources(num_slots=2, device_bytes=12 * 10**9), JOB, LINKS)
    assert max(roomy.device_bytes) == 6.1e9


def test_a_limit_that_the_job_brings_along_stays() -> None:
    job = replace(JOB, resident_bytes=10**9)
    _, expected, _ = choose(2, 1, "dense", Resources(num_slots=2, device_bytes=80 * 10**9), job, LINKS)
    assert max(expected.device_bytes) == 2.1e9


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.stages: 13 stages for 12 blocks"):
        choose(13, 1, "pruned", Resources(num_slots=100), JOB, LINKS)


def test_more_replicas_than_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.replicas: 33 replicas for 32 batches"):
        choose(1, 33, "pruned", Resources(num_slots=100), JOB, LINKS)


def test_more_replicas_than_workers_are_refused() -> None:
    message = r"cluster\.replicas: the 9 replicas .* room for 8 workers; ask for 1 to 8, or add machines"
    with pytest.raises(ConfigError, match=message):
        choose("auto", 9, "pruned", ROOM, JOB, LINKS)


def test_a_cluster_without_room_for_one_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no room for a worker: .* add machines, or ask for less for each worker"):
        choose("auto", "auto", "pruned", Resources(num_slots=0), JOB, LINKS)


def test_a_worker_with_too_little_memory_is_refused() -> None:
    message = r"a worker needs 2\.1 GB where its blocks run, and has 2 GB; .* lower compute\.batch, .*\(wanda\)"
    with pytest.raises(ConfigError, match=message):
        choose("auto", 1, "pruned", Resources(num_slots=8, device_bytes=2 * 10**9), JOB, LINKS)
