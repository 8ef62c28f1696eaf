"""Learnable sparsities: shares that start at the target, a gradient that is autograd's, a budget met to the weight."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sparsity
from pipeline.methods.row_sparsity import (
    NUM_CANDIDATES,
    MaskedWeight,
    candidate_sparsities,
    hard_keep,
    prefix_at_candidates,
    project_to_budget,
    pruned_counts,
    shares,
    tilt_towards,
)
from pipeline.sparsity import row_ranks
from tests import reference

CPU = torch.device("cpu")
PERCENT = torch.arange(101, dtype=torch.float64) / 100


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_sparsity(share_GP: torch.Tensor) -> torch.Tensor:
    return share_GP.double() @ PERCENT


# ------------------------------------------------------------------------------------------------------- shares


def test_candidates_are_every_percent_from_0_to_100() -> None:
    assert NUM_CANDIDATES == 101
    assert torch.equal(candidate_sparsities(CPU), PERCENT.float())


@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_untrained_rows_start_at_the_target(percent: int) -> None:
    share_GP = shares(torch.zeros(3, 101), tilt_towards(percent / 100, CPU), reach=1.0)
    assert mean_sparsity(share_GP).tolist() == pytest.approx([percent / 100] * 3, abs=1e-6)
    assert share_GP.double().sum(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize(("target", "slope"), [(0.3, -2.614), (0.5, 0.0), (0.6, 1.205), (0.7, 2.614), (0.8, 4.67)])
def test_the_tilt_is_the_straight_line_of_largest_entropy(target: float, slope: float) -> None:
    tilt_P = tilt_towards(target, CPU)
    assert tilt_P.dtype == torch.float32
    assert tilt_P.tolist() == pytest.approx((slope * PERCENT).tolist(), abs=5e-3)


@pytest.mark.parametrize("target", [0.001, 0.999])
def test_targets_close_to_the_ends_are_reached(target: float) -> None:
    share_P = torch.softmax(tilt_towards(target, CPU).double(), dim=0)
    assert mean_sparsity(share_P).item() == pytest.approx(target, abs=1e-5)


def test_at_one_half_and_reach_1_shares_are_those_of_the_released_code() -> None:
    theta_GP = 3 * normal(5, 101, seed=1)
    expected_GP = torch.softmax(torch.sigmoid(theta_GP.double()), dim=1)
    assert torch.allclose(shares(theta_GP, tilt_towards(0.5, CPU), reach=1.0).double(), expected_GP, rtol=1e-5)


@pytest.mark.parametrize("reach", [0.5, 1.0, 4.0])
def test_shares_stay_within_a_factor_of_the_tilt(reach: float) -> None:
    tilt_P = tilt_towards(0.7, CPU)
    factor_GP = shares(100 * normal(20, 101, seed=2), tilt_P, reach) / torch.softmax(tilt_P, dim=0)
    assert (factor_GP.amax(dim=1) / factor_GP.amin(dim=1) <= math.exp(reach) * 1.001).all()


def test_at_one_half_and_reach_1_no_row_leaves_0_376_to_0_624() -> None:
    """The extreme distributions put all the weight they can above, or below, one candidate."""
    upwards = torch.where(torch.arange(101) >= torch.arange(102)[:, None], 50.0, -50.0)
    theta_GP = torch.cat([upwards, -upwards, 50 * normal(200, 101, seed=3)])
    sparsity_G = mean_sparsity(shares(theta_GP, tilt_towards(0.5, CPU), reach=1.0))
    assert 0.376 <= sparsity_G.min() < 0.38
    assert 0.62 < sparsity_G.max() <= 0.624


# --------------------------------------------------------------------------------------------- masks and gradient

SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (40, 100), (6, 333), (3, 1000)])
GROUPS = pytest.mark.parametrize("num_groups", ["row", "linear"])


def problem(shape: tuple[int, int], num_groups: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares that differ from group to group, weights, ranks that have nothing to do with them, and counts."""
    groups = shape[0] if num_groups == "row" else 1
    share_GP = torch.softmax(2 * normal(groups, 101, seed=4), dim=1)
    counts_G = (mean_sparsity(share_GP) * shape[1]).floor().long()
    return share_GP, normal(*shape, seed=5), row_ranks(normal(*shape, seed=6)), counts_G


@GROUPS
@SHAPES
def test_the_gradient_is_that_of_the_soft_mask_written_out(shape: tuple[int, int], num_groups: str) -> None:
    share_GP, weight_OD, rank_OD, counts_G = problem(shape, num_groups)
    x_TD, y_TO = normal(20, shape[1], seed=7), normal(20, shape[0], seed=8)

    exact_GP = share_GP.double().requires_grad_()
    exact_OD = reference.straight_through_weight(exact_GP, weight_OD.double(), rank_OD, counts_G)
    torch.autograd.backward((x_TD.double() @ exact_OD.T - y_TO).square().sum())

    share_GP.requires_grad_()
    masked_OD = MaskedWeight.apply(share_GP, weight_OD, rank_OD, counts_G)  # type: ignore[no-untyped-call]
    torch.autograd.backward((x_TD @ masked_OD.T - y_TO).square().sum())

    assert torch.equal(masked_OD, exact_OD.detach().float())
    assert share_GP.grad is not None
    assert exact_GP.grad is not None
    difference = (share_GP.grad.double() - exact_GP.grad).norm() / exact_GP.grad.norm()
    assert difference.item() < 1e-5


@GROUPS
def test_slabs_do_not_change_the_gradient(num_groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight_OD, rank_OD, _ = problem((40, 100), num_groups)
    whole = prefix_at_candidates(weight_OD.sin(), weight_OD.__getitem__, rank_OD)
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 7 * 100 + 1)
    assert torch.equal(prefix_at_candidates(weight_OD.sin(), weight_OD.__getitem__, rank_OD), whole)


@pytest.mark.parametrize("num_columns", [7, 100, 576, 5120, 11008, 12800, 28672])
def test_candidates_cut_a_row_at_the_floor_of_their_share(num_columns: int) -> None:
    """With all products 1, the sum over the floor(D p) lowest ranks is that count itself."""
    ones_OD, rank_OD = torch.ones(1, num_columns), torch.arange(num_columns)[None]
    counts = prefix_at_candidates(ones_OD, ones_OD.__getitem__, rank_OD)[0].long().tolist()
    assert counts == [percent * num_columns // 100 for percent in range(101)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@GROUPS
def test_the_forward_drops_the_floor_of_each_groups_sparsity(num_groups: str, dtype: torch.dtype) -> None:
    share_GP, weight_OD, rank_OD, counts_G = problem((40, 100), num_groups)
    weight_OD = weight_OD.to(dtype)
    before = weight_OD.clone()
    masked_OD = MaskedWeight.apply(share_GP, weight_OD, rank_OD, counts_G)  # type: ignore[no-untyped-call]
    assert torch.equal(masked_OD, weight_OD * (rank_OD >= counts_G[:, None]))
    assert masked_OD.dtype == dtype
    assert torch.equal(weight_OD, before)
    assert (~hard_keep(rank_OD, counts_G)).sum(dim=1).tolist() == counts_G.expand(40).tolist()


@pytest.mark.parametrize("num_columns", [10, 64, 576, 11008, 28672])
def test_a_mean_that_rounding_left_short_of_one_half_still_drops_half(num_columns: int) -> None:
    """The float32 mean of 101 equal shares can come out as 0.49999997; the floor must not lose a weight to that."""
    short = torch.nextafter(torch.tensor([0.5]), torch.tensor([0.0]))
    assert pruned_counts(short, num_columns).tolist() == [num_columns // 2]


@pytest.mark.parametrize(
    ("alpha", "num_columns", "count"), [(0.0, 9, 0), (1.0, 9, 9), (0.29, 100, 29), (0.555, 100, 55), (0.999, 100, 99)]
)
def test_a_sparsity_drops_the_floor_of_its_share(alpha: float, num_columns: int, count: int) -> None:
    assert pruned_counts(torch.tensor([alpha]), num_columns).tolist() == [count]


# ------------------------------------------------------------------------------------------------------- budget

Alphas = list[tuple[int, list[float]]]
ALPHA = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 1 << 24).map(lambda n: n / (1 << 24)))
LINEARS = st.lists(st.tuples(st.integers(1, 40), st.lists(ALPHA, min_size=1, max_size=6)), min_size=1, max_size=4)


def project(linears: Alphas, budget: int) -> list[torch.Tensor]:
    return project_to_budget([torch.tensor(alpha) for _, alpha in linears], [width for width, _ in linears], budget)


def flat(linears: Alphas, counts: list[torch.Tensor]) -> list[tuple[float, int, int]]:
    """Return (alpha, width, count) of every row."""
    return [
        (alpha, width, count)
        for (width, alphas), counts_O in zip(linears, counts, strict=True)
        for alpha, count in zip(alphas, counts_O.tolist(), strict=True)
    ]


@settings(deadline=None, max_examples=200)
@given(linears=LINEARS, data=st.data())
def test_counts_meet_the_budget_and_shift_all_rows_alike(linears: Alphas, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(width * len(alphas) for width, alphas in linears)))
    counts = project(linears, budget)
    rows = flat(linears, counts)
    assert all(part.dtype == torch.int64 for part in counts)
    assert sum(count for _, _, count in rows) == budget
    assert all(0 <= count <= width for _, width, count in rows)
    # one shift s explains every row: clip(alpha + s, 0, 1) * width lies within a weight of the row's count
    lowest = max(((count - 1) / width - alpha for alpha, width, count in rows if count > 1), default=-1.0)
    highest = min(((count + 1) / width - alpha for alpha, width, count in rows if count + 1 < width), default=1.0)
    assert lowest <= highest + 1e-9


@settings(deadline=None)
@given(width=st.integers(1, 50), alphas=st.lists(ALPHA, min_size=2, max_size=12), data=st.data())
def test_a_sparser_row_never_drops_less(width: int, alphas: list[float], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, width * len(alphas)))
    rows = sorted(flat([(width, alphas)], project([(width, alphas)], budget)))
    for (lower, _, fewer), (higher, _, more) in pairwise(rows):
        assert fewer <= more or lower == higher


@settings(deadline=None)
@given(width=st.integers(1, 50), num_rows=st.integers(1, 12), alpha=ALPHA, data=st.data())
def test_equal_rows_drop_the_same_and_the_first_ones_what_is_left(
    width: int, num_rows: int, alpha: float, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(0, width * num_rows))
    (counts,) = project([(width, [alpha] * num_rows)], budget)
    share, rest = divmod(budget, num_rows)
    assert counts.tolist() == [share + 1] * rest + [share] * (num_rows - rest)


def test_equal_sparsities_stay_equal_in_rows_of_any_length() -> None:
    counts = project([(64, [0.5] * 30), (100, [0.5] * 20)], 1920 // 2 + 2000 // 2)
    assert [set(part.tolist()) for part in counts] == [{32}, {50}]


def test_of_very_many_equal_rows_the_first_ones_take_what_is_left() -> None:
    (counts,) = project([(10, [0.5] * 5000)], 5 * 5000 + 1234)
    assert counts.tolist() == [6] * 1234 + [5] * (5000 - 1234)


def test_rows_that_already_meet_the_budget_are_not_moved() -> None:
    assert [part.tolist() for part in project([(10, [0.1, 0.9]), (4, [0.5])], 12)] == [[1, 9], [2]]


def test_the_projection_shifts_and_does_not_scale() -> None:
    (counts,) = project([(1000, [0.2, 0.5, 0.8])], 1800)
    assert counts.tolist() == [300, 600, 900]
