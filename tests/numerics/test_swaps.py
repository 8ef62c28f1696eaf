"""Swaps against a plain loop over one row at a time in float64, and where they stop."""

import pytest
import torch

from pipeline.methods.dsnot import AUTHORS_TOLERANCE
from pipeline.methods.step import LinearStep, LinearView
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity
from tests.mended import FIRST, HALF, SPARSITIES, first_step, inputs, mend, normal, textbook, tried, view_of


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


@SPARSITIES
def test_swaps_by_error_save_more_of_it_than_swaps_by_mean(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(40, 64, seed=5), inputs(64)
    view = view_of(weight_OD, first_step(Wanda(), weight_OD, x_TD, sparsity), sparsity)
    by_mean, by_error = (mend(view, x_TD, "row", how).notes for how in ("mean", "error"))
    assert by_error["error_after"] < 0.8 * by_mean["error_after"]
    assert by_error["refused_rows"] == 0
