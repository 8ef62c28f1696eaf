"""DSnoT against a plain loop over one row at a time in float64, the laws its masks keep, and its guard."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sparsity as slabs
from pipeline.methods import swaps
from pipeline.methods.dsnot import AUTHORS_TOLERANCE, Dsnot
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import LinearStep, LinearView, PrunedLinear
from pipeline.methods.swaps import LEAST_GAIN
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import ColumnSquares, Gathered, Gram, Moments
from tests import reference

HALF, TWO_FOUR = Unstructured(ratio=0.5), SemiStructured(keep=2, group=4)
SPARSITIES = pytest.mark.parametrize("sparsity", [HALF, Unstructured(ratio=0.7), TWO_FOUR], ids=str)
Guard = Literal["row", "linear", "none"]
Criterion = Literal["mean", "error"]
CRITERIA = pytest.mark.parametrize("criterion", ["mean", "error"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_features: int, num_tokens: int = 300, seed: int = 1) -> torch.Tensor:
    """Tokens whose features differ in mean and scale, and are correlated, as those of language models are."""
    causes = normal(num_tokens, 3, seed=seed) @ normal(3, num_features, seed=seed + 1)
    own = causes + normal(num_tokens, num_features, seed=seed + 2)
    return (own + 2 * normal(num_features, seed=seed + 3)) * torch.logspace(-0.5, 0.5, num_features)


def gathered(x_TD: torch.Tensor) -> Gathered:
    statistics = [kind.empty(x_TD.shape[1], x_TD.device) for kind in (ColumnSquares, Moments, Gram)]
    for statistic in statistics:
        statistic.update(x_TD)
    return Gathered(statistics)


def first_step(step: LinearStep, weight_OD: torch.Tensor, x_TD: torch.Tensor, sparsity: Sparsity) -> PrunedLinear:
    return step.solver(gathered(x_TD))(LinearView(dense_OD=weight_OD, sparsity=sparsity))


def view_of(weight_OD: torch.Tensor, pruned: PrunedLinear, sparsity: Sparsity) -> LinearView:
    return LinearView(dense_OD=weight_OD, sparsity=sparsity, keep_OD=pruned.keep_OD, updated_OD=pruned.weight_OD)


def mend(
    view: LinearView, x_TD: torch.Tensor, guard: Guard = "none", criterion: Criterion = "mean", **options: float | bool
) -> PrunedLinear:
    step = Dsnot.model_validate({"guard": guard, "criterion": criterion, **options})
    return step.solver(gathered(x_TD).holding(step.statistics))(view)


def textbook(
    view: LinearView,
    x_TD: torch.Tensor,
    cycles: int = 50,
    tolerance: float = AUTHORS_TOLERANCE,
    overshoot: bool = False,
) -> torch.Tensor:
    assert view.keep_OD is not None
    group = view.sparsity.group if isinstance(view.sparsity, SemiStructured) else None
    rows = zip(view.dense_OD.tolist(), view.weight_OD.tolist(), view.keep_OD.tolist(), strict=True)
    options = {"cycles": cycles, "tolerance": tolerance, "overshoot": overshoot, "group": group}
    return torch.tensor([reference.dsnot_row(*row, x_TD, **options) for row in rows])


def tried(view: LinearView, x_TD: torch.Tensor, cycles: int) -> torch.Tensor:
    assert view.keep_OD is not None
    group = view.sparsity.group if isinstance(view.sparsity, SemiStructured) else view.keep_OD.shape[1]
    gram_DD, options = x_TD.double().T @ x_TD.double(), {"cycles": cycles, "least_gain": LEAST_GAIN, "group": group}
    rows = zip(view.dense_OD.tolist(), view.weight_OD.tolist(), view.keep_OD.tolist(), strict=True)
    return torch.tensor([reference.squared_error_row(*row, gram_DD, **options) for row in rows])


def row_errors(view: LinearView, pruned: PrunedLinear, x_TD: torch.Tensor) -> torch.Tensor:
    """Squared error of every row's output, float64."""
    weight_OD = view.dense_OD if pruned.weight_OD is None else pruned.weight_OD
    missing_OD = view.dense_OD.double() - weight_OD.double() * pruned.keep_OD
    return (x_TD.double() @ missing_OD.T).square().sum(dim=0)


def given_errors(view: LinearView, x_TD: torch.Tensor) -> torch.Tensor:
    assert view.keep_OD is not None
    return row_errors(view, PrunedLinear(keep_OD=view.keep_OD, weight_OD=view.updated_OD), x_TD)


FIRST = pytest.mark.parametrize(
    "first",
    [Wanda(), Magnitude(), Magnitude(scope="row"), SparseGPT()],
    ids=["wanda", "magnitude", "by row", "sparsegpt"],
)


@FIRST
@SPARSITIES
@pytest.mark.parametrize("overshoot", [False, True])
@pytest.mark.parametrize(("cycles", "tolerance"), [(50, AUTHORS_TOLERANCE), (3, 0.0), (50, 0.05)])
def test_swaps_are_those_of_the_plain_loop(
    first: LinearStep, sparsity: Sparsity, cycles: int, tolerance: float, overshoot: bool
) -> None:
    weight_OD, x_TD = normal(24, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(first, weight_OD, x_TD, sparsity), sparsity)
    keep_OD = mend(view, x_TD, cycles=cycles, tolerance=tolerance, overshoot=overshoot).keep_OD
    assert not torch.equal(keep_OD, view.keep_OD)
    assert torch.equal(keep_OD, textbook(view, x_TD, cycles, tolerance, overshoot))


@FIRST
@SPARSITIES
@pytest.mark.parametrize("cycles", [1, 4, 50])
def test_swaps_by_error_are_those_that_trying_finds(first: LinearStep, sparsity: Sparsity, cycles: int) -> None:
    weight_OD, x_TD = normal(8, 32, seed=5), inputs(32)
    view = view_of(weight_OD, first_step(first, weight_OD, x_TD, sparsity), sparsity)
    keep_OD = mend(view, x_TD, criterion="error", cycles=cycles).keep_OD
    assert not torch.equal(keep_OD, view.keep_OD)
    assert torch.equal(keep_OD, tried(view, x_TD, cycles))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), guard=st.sampled_from(["row", "linear", "none"]), how=st.sampled_from(["mean", "error"]))
def test_counts_stay_and_nothing_gets_worse_whatever_the_mask(
    data: st.DataObject, guard: Guard, how: Criterion
) -> None:
    overshoot = data.draw(st.booleans())
    group = data.draw(st.sampled_from([1, 2, 4, 7]))
    num_rows, num_features = data.draw(st.integers(1, 9)), group * data.draw(st.integers(1, 8))
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1e-4, 1.0, 1e4]))
    weight_OD, x_TD = normal(num_rows, num_features, seed=seed), scale * inputs(num_features, 20, seed)
    x_TD[:, data.draw(st.integers(0, num_features - 1))] = data.draw(st.sampled_from([0.0, 3.0]))
    sparsity: Sparsity = HALF
    keep_OD = normal(num_rows, num_features, seed=seed + 1) > data.draw(st.sampled_from([-9, -1, 0, 1, 9]))
    if group > 1:
        sparsity = SemiStructured(keep=data.draw(st.integers(1, group - 1)), group=group)
        keep_OD = reference.keep_in_groups(normal(num_rows, num_features, seed=seed + 1), sparsity.keep, group)
    view = LinearView(dense_OD=weight_OD, sparsity=sparsity, keep_OD=keep_OD)
    mended = mend(view, x_TD, guard, how, tolerance=0.0, overshoot=overshoot)
    assert torch.equal(mended.keep_OD.sum(dim=1), keep_OD.sum(dim=1))
    if group > 1:
        assert (mended.keep_OD.reshape(-1, group).sum(dim=1) == sparsity.keep).all()
    before_O, after_O = given_errors(view, x_TD), row_errors(view, mended, x_TD)
    size = (x_TD.double() @ weight_OD.double().T).square().sum(dim=0)
    if guard == "row" or how == "error":
        assert (after_O <= before_O + 1e-4 * size).all()
    if guard == "linear":
        assert after_O.sum() <= before_O.sum() + 1e-4 * size.sum()


@SPARSITIES
def test_the_guard_takes_back_the_rows_that_swaps_have_made_worse_and_no_others(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(40, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, sparsity), sparsity)
    assert view.keep_OD is not None
    free, guarded = mend(view, x_TD), mend(view, x_TD, "row")
    worse_O = row_errors(view, free, x_TD) > given_errors(view, x_TD)
    assert 0 < worse_O.sum() < 40
    assert torch.equal(guarded.keep_OD, torch.where(worse_O[:, None], view.keep_OD, free.keep_OD))
    assert guarded.notes["refused_rows"] == worse_O.sum()
    assert guarded.notes["swaps"] == (guarded.keep_OD & ~view.keep_OD).sum()
    assert free.notes == {"swaps": (free.keep_OD & ~view.keep_OD).sum()}


@FIRST
@pytest.mark.parametrize("guard", ["row", "linear"])
def test_a_linear_is_taken_back_as_a_whole_or_not_at_all(first: LinearStep, guard: Guard) -> None:
    weight_OD, x_TD = normal(40, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(first, weight_OD, x_TD, HALF), HALF)
    assert view.keep_OD is not None
    free, guarded = mend(view, x_TD), mend(view, x_TD, "linear")
    is_worse = bool(row_errors(view, free, x_TD).sum() > given_errors(view, x_TD).sum())
    assert torch.equal(guarded.keep_OD, view.keep_OD if is_worse else free.keep_OD)
    assert guarded.notes["refused_rows"] == (40 if is_worse else 0)


@FIRST
@CRITERIA
@pytest.mark.parametrize("guard", ["row", "linear"])
def test_noted_errors_are_those_of_the_outputs(first: LinearStep, guard: Guard, criterion: Criterion) -> None:
    weight_OD, x_TD = normal(40, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(first, weight_OD, x_TD, HALF), HALF)
    mended = mend(view, x_TD, guard, criterion)
    power = (x_TD.double() @ weight_OD.double().T).square().sum()
    assert mended.notes["error_before"] == pytest.approx((given_errors(view, x_TD).sum() / power).item(), rel=1e-4)
    assert mended.notes["error_after"] == pytest.approx((row_errors(view, mended, x_TD).sum() / power).item(), rel=1e-4)


@SPARSITIES
@CRITERIA
def test_kept_weights_keep_their_update_and_what_grows_is_dense_again(sparsity: Sparsity, criterion: Criterion) -> None:
    weight_OD, x_TD = normal(24, 64, seed=5).bfloat16(), inputs(64)
    view = view_of(weight_OD, first_step(SparseGPT(), weight_OD, x_TD, sparsity), sparsity)
    mended = mend(view, x_TD, criterion=criterion)
    assert view.keep_OD is not None
    assert mended.weight_OD is not None
    assert mended.weight_OD.dtype == torch.bfloat16
    grown_OD, gone_OD = mended.keep_OD & ~view.keep_OD, view.keep_OD & ~mended.keep_OD
    assert grown_OD.any()
    assert torch.equal(mended.weight_OD[grown_OD], weight_OD[grown_OD])
    stayed_OD = mended.keep_OD & view.keep_OD
    assert torch.equal(mended.weight_OD[stayed_OD], view.weight_OD[stayed_OD])
    assert not mended.weight_OD[~mended.keep_OD].any()
    assert gone_OD.sum() == grown_OD.sum()


def test_weights_that_no_step_has_changed_are_left_alone() -> None:
    weight_OD, x_TD = normal(24, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, HALF), HALF)
    assert view.keep_OD is not None
    before = weight_OD.clone(), view.keep_OD.clone()
    assert mend(view, x_TD, "row").weight_OD is None
    assert torch.equal(weight_OD, before[0])
    assert torch.equal(view.keep_OD, before[1])


@SPARSITIES
@CRITERIA
@pytest.mark.parametrize("guard", ["row", "none"])
def test_longer_sequences_of_the_same_tokens_make_the_same_swaps(
    sparsity: Sparsity, guard: Guard, criterion: Criterion
) -> None:
    weight_OD, x_TD = normal(24, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, sparsity), sparsity)
    once, often = (mend(view, tokens, guard, criterion, tolerance=0.02) for tokens in (x_TD, x_TD.repeat(32, 1)))
    assert torch.equal(once.keep_OD, often.keep_OD)


def test_a_row_stops_when_its_error_is_tolerable() -> None:
    weight_OD, x_TD = normal(24, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, HALF), HALF)
    swaps = [mend(view, x_TD, tolerance=tolerance, overshoot=True).notes["swaps"] for tolerance in (0.0, 0.1, 1e6)]
    assert swaps[0] > swaps[1] > swaps[2] == 0


def test_swaps_bring_the_expected_output_back() -> None:
    weight_OD, x_TD = normal(40, 128, seed=5), inputs(128)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, HALF), HALF)
    mended = mend(view, x_TD)
    expected = [((weight_OD * ~keep_OD) @ x_TD.mean(dim=0)).abs().mean() for keep_OD in (view.keep_OD, mended.keep_OD)]
    assert expected[1] < 0.5 * expected[0]


def test_a_dead_input_and_a_weight_of_zero_are_never_swapped() -> None:
    weight_OD, x_TD = normal(24, 32, seed=5), inputs(32)
    x_TD[:, [3, 20]] = 0
    weight_OD[:, [5, 9]] = 0
    keep_OD = normal(24, 32, seed=6) > 0
    mended = mend(LinearView(dense_OD=weight_OD, sparsity=HALF, keep_OD=keep_OD), x_TD, tolerance=0.0)
    silent = [3, 5, 9, 20]
    assert torch.equal(mended.keep_OD[:, silent], keep_OD[:, silent])
    assert not torch.equal(mended.keep_OD, keep_OD)


@pytest.mark.parametrize("constant", [1e-6, 0.3, 7.1])
def test_an_input_that_never_varies_grows_first(constant: float) -> None:
    weight_OD, x_TD = normal(1, 32, seed=5).abs(), inputs(32).abs()
    weight_OD[:, 24:] *= -1
    x_TD[:, 3] = constant
    keep_OD = torch.arange(32)[None] >= 16  # what is pruned is positive: so is the error
    keep_OD[:, 16:24] = True
    view = LinearView(dense_OD=weight_OD, sparsity=HALF, keep_OD=keep_OD)
    mended = mend(view, x_TD, cycles=1)
    assert (mended.keep_OD & ~keep_OD).nonzero().tolist() == [[0, 3]]
    assert torch.equal(mended.keep_OD, textbook(view, x_TD, cycles=1))


@pytest.mark.parametrize("sparsity", [HALF, SemiStructured(keep=1, group=2)], ids=str)
@pytest.mark.parametrize("num_features", [2, 4])
def test_a_row_whose_candidates_are_used_up_stops(sparsity: Sparsity, num_features: int) -> None:
    weight_OD, x_TD = normal(30, num_features, seed=5), inputs(num_features)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, sparsity), sparsity)
    keep_OD = mend(view, x_TD, tolerance=0.0, overshoot=True).keep_OD
    assert torch.equal(keep_OD, textbook(view, x_TD, tolerance=0.0, overshoot=True))
    assert not torch.equal(keep_OD, view.keep_OD)


@FIRST
@CRITERIA
@pytest.mark.parametrize("guard", ["row", "linear", "none"])
def test_neither_slabs_nor_a_transposed_storage_change_the_result(
    first: LinearStep, guard: Guard, criterion: Criterion, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OD, x_TD = normal(24, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(first, weight_OD, x_TD, HALF), HALF)
    whole = mend(view, x_TD, guard, criterion)
    stored = replace(view, dense_OD=weight_OD.T.contiguous().T)
    assert torch.equal(mend(stored, x_TD, guard, criterion).keep_OD, whole.keep_OD)
    monkeypatch.setattr(slabs, "SLAB_NUMEL", 5 * 64 + 1)
    monkeypatch.setattr(swaps, "CPU_SLAB_NUMEL", 2 * 64 + 1)
    by_slab = mend(view, x_TD, guard, criterion)
    assert torch.equal(by_slab.keep_OD, whole.keep_OD)
    assert by_slab.notes == pytest.approx(whole.notes, rel=1e-5)


@SPARSITIES
def test_swaps_by_error_save_more_of_it_than_swaps_by_mean(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(40, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, sparsity), sparsity)
    by_mean, by_error = (mend(view, x_TD, "row", how).notes for how in ("mean", "error"))
    assert by_error["error_after"] < 0.8 * by_mean["error_after"]
    assert by_error["refused_rows"] == 0


def test_only_what_is_needed_is_gathered() -> None:
    assert Dsnot().statistics == Dsnot(guard="none").statistics == (Gram,)
    assert Dsnot(criterion="mean").statistics == (Moments, Gram)
    assert Dsnot(criterion="mean", guard="none").statistics == (Moments,)


def test_the_default_tolerance_is_the_authors_on_their_sequences() -> None:
    assert Dsnot().tolerance * 2048 == pytest.approx(0.1)
    assert Dsnot().cycles == 50
