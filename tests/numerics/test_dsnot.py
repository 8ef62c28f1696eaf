"""DSnoT as a step: the laws its masks keep, its guard, its notes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sparsity as slabs
from pipeline.methods import swaps
from pipeline.methods.dsnot import Dsnot
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import LinearStep, LinearView
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import Gram, Moments
from tests import reference
from tests.mended import (
    CRITERIA,
    FIRST,
    HALF,
    SPARSITIES,
    Criterion,
    Guard,
    first_step,
    given_errors,
    inputs,
    mend,
    normal,
    row_errors,
    view_of,
)


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


def test_only_what_is_needed_is_gathered() -> None:
    assert Dsnot().statistics == Dsnot(guard="none").statistics == (Gram,)
    assert Dsnot(criterion="mean").statistics == (Moments, Gram)
    assert Dsnot(criterion="mean", guard="none").statistics == (Moments,)


def test_the_default_tolerance_is_the_authors_on_their_sequences() -> None:
    assert Dsnot().tolerance * 2048 == pytest.approx(0.1)
    assert Dsnot().cycles == 50
