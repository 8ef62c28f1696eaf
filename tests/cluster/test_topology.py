"""Blocks into stages, sequences into replicas: against brute force, and what each refusal says."""

from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import Topology, partition, split_sequences
from pipeline.errors import ConfigError

costs_of_blocks = st.lists(st.one_of(st.just(0.1), st.floats(0, 1e6)), min_size=1, max_size=8)


def all_partitions(num_blocks: int, num_stages: int) -> list[tuple[range, ...]]:
    return [
        tuple(range(start, stop) for start, stop in pairwise((0, *cuts, num_blocks)))
        for cuts in combinations(range(1, num_blocks), num_stages - 1)
    ]


def judged(stages: tuple[range, ...], costs: list[float]) -> tuple[Fraction, Fraction, tuple[int, ...]]:
    """What makes one partition better than another: smaller is better, the first difference decides."""
    sums = [sum((Fraction(costs[block]) for block in stage), Fraction()) for stage in stages]
    return max(sums), sum((cost**2 for cost in sums), Fraction()), tuple(-len(stage) for stage in stages)


@given(costs_of_blocks, st.data())
def test_a_partition_is_the_best_of_all_there_are(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    best = min(all_partitions(len(costs), num_stages), key=lambda stages: judged(stages, costs))
    assert partition(costs, num_stages) == best


def test_equal_blocks_make_stages_of_equal_length_the_longer_ones_first() -> None:
    assert partition([0.1] * 10, 4) == (range(0, 3), range(3, 6), range(6, 8), range(8, 10))


def test_a_costly_block_has_a_stage_to_itself() -> None:
    assert partition([1, 1, 9, 1, 1], 3) == (range(0, 2), range(2, 3), range(3, 5))


def test_blocks_that_cost_nothing_still_fill_every_stage() -> None:
    assert [len(stage) for stage in partition([0.0] * 5, 5)] == [1] * 5


def test_a_large_model_is_split_at_once() -> None:
    stages = partition([1 + 0.01 * (block % 7) for block in range(126)], 63)
    assert {len(stage) for stage in stages} <= {1, 2, 3}


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_blocks_or_none_are_refused(num_stages: int) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.stages: {num_stages} stages for 3 blocks; .* ask for 1 to 3"):
        partition([1.0, 1.0, 1.0], num_stages)


@given(st.integers(1, 60), st.integers(1, 7), st.data())
def test_sequences_are_split_between_batches_as_evenly_as_can_be(
    num_sequences: int, batch: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, -(-num_sequences // batch)))
    parts = split_sequences(num_sequences, batch, replicas)
    assert [sequence for part in parts for sequence in part] == list(range(num_sequences))
    assert len(parts) == replicas
    assert all(part.start % batch == 0 for part in parts)
    batches = [-(-len(part) // batch) for part in parts]
    assert 1 <= min(batches) <= max(batches) <= min(batches) + 1
    assert batches == sorted(batches, reverse=True)


@pytest.mark.parametrize("replicas", [0, 5])
def test_more_replicas_than_batches_or_none_are_refused(replicas: int) -> None:
    message = (
        rf"cluster\.replicas: {replicas} replicas for 4 batches \(14 sequences, 4 in each\).*"
        r"ask for 1 to 4, lower compute\.batch, or raise calibration\.sequences"
    )
    with pytest.raises(ConfigError, match=message):
        split_sequences(14, 4, replicas)


def test_a_topology_knows_its_workers_and_who_owns_a_block() -> None:
    topology = Topology(stages=(range(0, 3), range(3, 4), range(4, 6)), replicas=2, handoff="dense")
    assert (topology.num_stages, topology.num_blocks, topology.num_workers) == (3, 6, 6)
    assert topology.bounds == (0, 3, 4, 6)
    assert [topology.stage_of(block) for block in range(6)] == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "stages", [(), (range(1, 3),), (range(0, 2), range(3, 4)), (range(0, 2), range(2, 2)), (range(0, 4, 2),)]
)
def test_stages_with_gaps_or_without_blocks_cannot_be_made(stages: tuple[range, ...]) -> None:
    with pytest.raises(AssertionError):
        Topology(stages=stages, replicas=1, handoff="pruned")
