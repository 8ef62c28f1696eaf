"""Keep masks have exactly the zeros asked for, and drop exactly those a stable sort would drop."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sparsity
from pipeline.sparsity import (
    SemiStructured,
    Sparsity,
    Unstructured,
    divides,
    holds,
    keep_by_matrix,
    keep_by_row,
    keep_highest,
    kept_in_rows,
    map_rows,
    parse_sparsity,
    row_ranks,
)
from tests import reference

RATIOS = st.one_of(st.sampled_from([0.0, 0.29, 0.57, 1 / 3, 0.5, 0.7, 0.99]), st.floats(0, 0.99))
PATTERNS = [(1, 4), (2, 4), (3, 4), (4, 8), (3, 7), (1, 2)]
SLABS = st.sampled_from([1, 5, 16, sparsity.SLAB_NUMEL])
SCORES = st.one_of(
    st.integers(-2, 2).map(float),
    st.sampled_from([0.0, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)


@st.composite
def matrices(draw: st.DrawFn, group: int = 1) -> torch.Tensor:
    """Up to 5 rows of up to 24 groups; either heavy ties, zeros of both signs, any finite float, or one value."""
    num_rows, num_columns = draw(st.integers(1, 5)), group * draw(st.integers(1, 24 // group + 1))
    numel = num_rows * num_columns
    entries = draw(st.one_of(st.lists(SCORES, min_size=numel, max_size=numel), SCORES.map(lambda s: [s] * numel)))
    return torch.tensor(entries).reshape(num_rows, num_columns)


def floor_of(ratio: float, numel: int) -> int:
    """Return what a pocket calculator says, not what binary floats say."""
    return int(Decimal(repr(ratio)) * numel)


@settings(deadline=None)
@given(score_OD=matrices(), ratio=RATIOS, slab=SLABS)
def test_every_row_drops_the_first_of_its_stable_order(score_OD: torch.Tensor, ratio: float, slab: int) -> None:
    num_pruned = floor_of(ratio, score_OD.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "SLAB_NUMEL", slab)
        keep_OD = keep_by_row(score_OD, Unstructured(ratio=ratio))
    assert torch.equal(keep_OD, reference.keep_in_rows(score_OD, num_pruned))
    assert (~keep_OD).sum(dim=1).tolist() == [num_pruned] * len(score_OD)


@settings(deadline=None)
@given(score_OD=matrices(), ratio=RATIOS, slab=SLABS)
def test_the_matrix_drops_the_first_of_its_stable_order(score_OD: torch.Tensor, ratio: float, slab: int) -> None:
    num_pruned = floor_of(ratio, score_OD.numel())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "SLAB_NUMEL", slab)
        keep_OD = keep_by_matrix(score_OD, Unstructured(ratio=ratio))
    assert torch.equal(keep_OD, reference.keep_in_matrix(score_OD, num_pruned))


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), slab=SLABS)
def test_every_group_drops_the_first_of_its_stable_order(data: st.DataObject, keep: int, group: int, slab: int) -> None:
    score_OD = data.draw(matrices(group=group))
    pattern = SemiStructured(keep=keep, group=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "SLAB_NUMEL", slab)
        by_row, by_matrix = keep_by_row(score_OD, pattern), keep_by_matrix(score_OD, pattern)
    assert torch.equal(by_row, reference.keep_in_groups(score_OD, keep, group))
    assert torch.equal(by_matrix, by_row)
    assert (~by_row).sum().item() == pattern.num_pruned(score_OD.numel())
    assert holds(by_row, pattern)


@settings(deadline=None)
@given(score_OD=matrices(), slab=SLABS)
def test_ranks_are_places_in_the_stable_order(score_OD: torch.Tensor, slab: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "SLAB_NUMEL", slab)
        rank_OD = row_ranks(score_OD)
    assert torch.equal(rank_OD.long(), reference.ranks_in_rows(score_OD))


@settings(deadline=None)
@given(score_OD=matrices(), num_pruned=st.integers(0, 24))
def test_a_mask_is_a_cut_through_the_ranks(score_OD: torch.Tensor, num_pruned: int) -> None:
    num_pruned = min(num_pruned, score_OD.shape[1])
    assert torch.equal(keep_highest(score_OD, num_pruned), row_ranks(score_OD) >= num_pruned)


@pytest.mark.parametrize(("num_columns", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_ranks_take_two_bytes_wherever_they_fit(num_columns: int, dtype: torch.dtype) -> None:
    descending = torch.arange(num_columns, 0, -1).float()[None]
    rank_OD = row_ranks(descending)
    assert rank_OD.dtype == dtype
    assert rank_OD[0].tolist() == list(range(num_columns - 1, -1, -1))


def test_masks_are_the_same_whatever_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OD = torch.randint(0, 9, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    whole = keep_highest(score_OD, 40), row_ranks(score_OD)
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 7 * 64 + 1)
    assert torch.equal(keep_highest(score_OD, 40), whole[0])
    assert torch.equal(row_ranks(score_OD), whole[1])


def test_a_map_over_rows_sees_every_row_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 3 * 4)
    heights = []

    def double(rows_RN: torch.Tensor) -> torch.Tensor:
        heights.append(len(rows_RN))
        return 2 * rows_RN

    matrix_RN = torch.arange(28.0).reshape(7, 4)
    doubled_RN = map_rows(double, matrix_RN, torch.float64)
    assert heights == [3, 3, 1]
    assert torch.equal(doubled_RN, 2 * matrix_RN.double())
    assert doubled_RN.dtype == torch.float64


def test_rows_are_counted_whatever_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 3 * 4)
    keep_RN = torch.arange(40).reshape(10, 4) % 3 > 0
    assert kept_in_rows(keep_RN).tolist() == [sum(row) for row in keep_RN.tolist()]


def test_scores_are_left_as_they_were() -> None:
    score_OD = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    keep_by_row(score_OD, Unstructured(ratio=0.5))
    row_ranks(score_OD)
    assert score_OD.tolist() == [[3.0, 1.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("ratio", "numel", "count"),
    [(0.29, 100, 29), (0.7, 10, 7), (0.57, 100, 57), (0.99, 100, 99), (0.5, 5, 2), (0.0, 9, 0), (0.999, 10, 9)],
)
def test_a_fraction_of_a_count_is_its_floor_in_decimals(ratio: float, numel: int, count: int) -> None:
    assert Unstructured(ratio=ratio).num_pruned(numel) == count


def test_every_percent_of_a_hundred_is_itself() -> None:
    assert [Unstructured(ratio=i / 100).num_pruned(100) for i in range(100)] == list(range(100))


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
def test_a_pattern_removes_what_it_does_not_keep(keep: int, group: int) -> None:
    pattern = SemiStructured(keep=keep, group=group)
    assert pattern.num_pruned(6 * group) == 6 * (group - keep)
    assert pattern.ratio == pytest.approx(1 - keep / group)


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        (0.5, Unstructured(ratio=0.5)),
        ("0.29", Unstructured(ratio=0.29)),
        (0, Unstructured(ratio=0.0)),
        ("2:4", SemiStructured(keep=2, group=4)),
        (" 4 : 8 ", SemiStructured(keep=4, group=8)),
    ],
)
def test_sparsities_are_read(value: float | str, parsed: Sparsity) -> None:
    assert parse_sparsity(value) == parsed
    assert parse_sparsity(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "sparsity is 1.0; the fraction removed must be at least 0 and below 1"),
        ("-0.1", "sparsity is -0.1; the fraction removed must be at least 0 and below 1"),
        ("nan", "sparsity is nan; the fraction removed"),
        ("50%", "sparsity '50%' is neither a fraction such as 0.5 nor a pattern such as 2:4"),
        ("", "sparsity '' is neither"),
        ("4:2", "pattern 4:2 keeps 4 of 2; the number kept must be at least 1 and below the group size"),
        ("0:4", "pattern 0:4 keeps 0 of 4"),
        ("4:4", "pattern 4:4 keeps 4 of 4"),
        ("2:4:8", "pattern '2:4:8' is not KEPT:GROUP, two whole numbers such as 2:4"),
        ("-2:4", "pattern '-2:4' is not KEPT:GROUP"),
        ("²:4", "pattern '²:4' is not KEPT:GROUP"),
        (":", "pattern ':' is not KEPT:GROUP"),
    ],
)
def test_a_sparsity_that_cannot_be_is_refused_in_words(value: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_sparsity(value)


def test_only_patterns_ask_for_a_multiple_of_their_group() -> None:
    assert divides(Unstructured(ratio=0.5), 7)
    assert divides(SemiStructured(keep=3, group=7), 21)
    assert not divides(SemiStructured(keep=2, group=4), 6)


def test_a_pattern_holds_when_no_group_keeps_more() -> None:
    pattern = SemiStructured(keep=2, group=4)
    assert holds(torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool), pattern)
    assert not holds(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool), pattern)
