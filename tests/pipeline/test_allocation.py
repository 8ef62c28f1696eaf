"""How sparsity is spread over blocks: exact means, bounds, order, and the formula of the paper."""

import pickle
from fractions import Fraction
from itertools import pairwise, product
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.allocation import (
    STEPS,
    Allocation,
    Outliers,
    bounds_of,
    by_outliers,
    centred,
    exact_sparsities,
    held_at_bounds,
    rounded,
)
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured, parse_sparsity

HALF, FOUR_OF_EIGHT = Unstructured(ratio=0.5), SemiStructured(keep=4, group=8)

targets = st.sampled_from(["0.001", "0.29", "0.5", "0.7", "0.95", "0.995", "2:4", "4:8", "1:4", "7:8"]).map(
    parse_sparsity
)
spreads = st.sampled_from([0.01, 0.04, 0.08, 0.2, 0.5])
sizes = st.sampled_from([1, 600, 3_538_944, 202_375_168, 855_638_016])


def blocks(size: st.SearchStrategy[int]) -> st.SearchStrategy[list[Outliers]]:
    """Some blocks with any part of their weights being outliers."""
    block = st.tuples(size, st.fractions(0, 1, max_denominator=1000))
    made = block.map(lambda b: Outliers(num_outliers=floor(b[0] * b[1]), num_weights=b[0]))
    return st.lists(made, min_size=1, max_size=8)


def equal_blocks(numbers: list[int], size: int = 10_000) -> list[Outliers]:
    return [Outliers(num_outliers=number, num_weights=size) for number in numbers]


def lost(allocation: Allocation, found: list[Outliers]) -> Fraction:
    """Weights that all blocks are to lose, exactly."""
    return sum((allocation.of(b).fraction * block.num_weights for b, block in enumerate(found)), Fraction(0))


@given(targets, blocks(sizes), spreads)
def test_the_mean_over_all_weights_is_the_target_exactly(
    target: Sparsity, found: list[Outliers], spread: float
) -> None:
    exact = exact_sparsities(target, found, spread)
    total = sum(block.num_weights for block in found)
    mean = sum((s * block.num_weights for s, block in zip(exact, found, strict=True)), Fraction(0)) / total
    assert mean == target.fraction


@given(targets, blocks(sizes), spreads)
def test_every_block_stays_within_its_bounds_and_within_the_spread(
    target: Sparsity, found: list[Outliers], spread: float
) -> None:
    exact, (low, high) = exact_sparsities(target, found, spread), bounds_of(target)
    assert all(low <= sparsity <= high for sparsity in exact)
    assert max(exact) - min(exact) <= 2 * Fraction(repr(spread))


@given(targets, blocks(sizes), spreads)
def test_more_outliers_never_mean_more_sparsity(target: Sparsity, found: list[Outliers], spread: float) -> None:
    exact = exact_sparsities(target, found, spread)
    ranked = sorted(range(len(found)), key=lambda b: found[b].percentage)
    assert all(exact[a] >= exact[b] for a, b in pairwise(ranked))


@given(targets, blocks(st.just(4096)), spreads)
def test_blocks_of_one_size_lose_what_is_asked_to_the_weight(
    target: Sparsity, found: list[Outliers], spread: float
) -> None:
    allocation = by_outliers(target, found, spread)
    assert lost(allocation, found) == target.fraction * 4096 * len(found)
    pairs = product(enumerate(found), repeat=2)
    assert all(
        allocation.of(a).fraction >= allocation.of(b).fraction
        for (a, fewer), (b, more) in pairs
        if fewer.num_outliers < more.num_outliers
    )


@given(targets, blocks(sizes), spreads)
def test_blocks_of_any_size_are_rounded_by_less_than_a_step_and_keep_or_lose_no_more_than_asked(
    target: Sparsity, found: list[Outliers], spread: float
) -> None:
    allocation, exact = by_outliers(target, found, spread), exact_sparsities(target, found, spread)
    is_pattern = isinstance(target, SemiStructured)
    step = Fraction(1, target.group if isinstance(target, SemiStructured) else STEPS)
    assert all(abs(allocation.of(b).fraction - sparsity) < step for b, sparsity in enumerate(exact))
    excess = lost(allocation, found) - target.fraction * sum(block.num_weights for block in found)
    largest = max(block.num_weights for block in found)
    assert 0 <= (excess if is_pattern else -excess) < step * largest


@given(targets, st.integers(0, 100), st.integers(1, 8), spreads)
def test_blocks_with_the_same_outliers_share_alike(target: Sparsity, number: int, count: int, spread: float) -> None:
    found = [Outliers(num_outliers=number * size, num_weights=100 * size) for size in range(1, count + 1)]
    assert by_outliers(target, found, spread) == Allocation(target=target)
    assert held_at_bounds(target, found, spread) == []


def test_the_formula_of_the_paper() -> None:
    percent, spread = torch.tensor([0.3, 1.1, 0.7, 2.3], dtype=torch.float64), 0.08
    rise = 2 * spread * (percent - percent.min()) / (percent.max() - percent.min())
    density = rise - rise.mean() + 0.5
    exact = exact_sparsities(HALF, equal_blocks([30, 110, 70, 230]), spread)
    torch.testing.assert_close(torch.tensor([float(s) for s in exact], dtype=torch.float64), 1 - density)


def test_the_mean_is_weighted_by_size() -> None:
    found = [Outliers(num_outliers=0, num_weights=100), Outliers(num_outliers=300, num_weights=300)]
    assert exact_sparsities(HALF, found, 0.1) == [Fraction("0.65"), Fraction("0.45")]


def test_what_a_bound_takes_from_a_block_the_others_make_up_for() -> None:
    ninety = Unstructured(ratio=0.9)
    found = equal_blocks([0, 0, 0, 100])
    assert exact_sparsities(ninety, found, 0.25) == [Fraction("0.99")] * 3 + [Fraction("0.63")]
    assert held_at_bounds(ninety, found, 0.25) == [0, 1, 2]
    assert held_at_bounds(HALF, found, 0.08) == []


def test_every_block_has_its_own_n_of_m() -> None:
    allocation = by_outliers(FOUR_OF_EIGHT, equal_blocks([0, 10, 20, 30, 40]), 0.125)
    assert allocation.as_data(5) == ["3:8", "4:8", "4:8", "4:8", "5:8"]


@pytest.mark.parametrize("target", ["0.995", "0.99999999", "7:8", "1:4"])
def test_where_blocks_may_lose_no_more_than_is_asked_all_lose_it(target: str) -> None:
    asked = parse_sparsity(target)
    assert by_outliers(asked, equal_blocks([0, 10, 20, 30]), 0.5) == Allocation(target=asked)


def test_a_small_spread_leaves_two_of_four_as_they_are() -> None:
    allocation = by_outliers(SemiStructured(keep=2, group=4), equal_blocks([0, 10, 20, 30]), 0.04)
    assert allocation.as_data(4) == ["2:4"] * 4


def test_an_allocation_outlives_the_ledger_and_the_way_to_a_worker() -> None:
    allocation = by_outliers(HALF, equal_blocks([3, 14, 15, 92, 65]), 0.08)
    assert Allocation.from_data(HALF, allocation.as_data(5)) == allocation
    assert pickle.loads(pickle.dumps(allocation)) == allocation
    assert allocation.of(7) == HALF


@given(st.lists(st.fractions(0, 9, max_denominator=50), min_size=1, max_size=8), st.data())
def test_numbers_are_rounded_to_the_largest_sum_that_fits(wanted: list[Fraction], data: st.DataObject) -> None:
    whole = rounded(wanted, [7] * len(wanted))
    assert sum(whole) == floor(sum(wanted, Fraction(0)))
    assert all(abs(number - near) < 1 for number, near in zip(whole, wanted, strict=True))
    several = data.draw(st.lists(st.integers(1, 9), min_size=len(wanted), max_size=len(wanted)))
    whole = rounded(wanted, several)
    assert sum(map(int.__mul__, whole, several)) <= sum(n * s for n, s in zip(wanted, several, strict=True))


def test_ties_go_to_the_earlier_block() -> None:
    assert rounded([Fraction(1, 2)] * 4, [1] * 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("mean", [Fraction(0), Fraction(1, 3), Fraction(1)])
def test_any_mean_between_the_bounds_is_met(mean: Fraction) -> None:
    values = centred([Fraction(0), Fraction(-2, 7)], [1, 2], mean, Fraction(0), Fraction(1))
    assert (values[0] + 2 * values[1]) / 3 == mean
