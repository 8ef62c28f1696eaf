"""ADMM against its three variables written out in float64, and the laws of what it makes."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods import admm
from pipeline.methods.admm import Admm, grown_mask
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import Gram
from tests import reference
from tests.correlated import distance, gram_of, inputs, normal, squares_of
from tests.fitted import FOUR_OF_EIGHT, HALF, SPARSITIES, prune
from tests.solving import solve


def cubic(num_pruned: int, step: int, num_steps: int) -> int:
    """As many as 1 - (1 - t)^3 of what goes in the end."""
    return int(num_pruned * (1 - (1 - (step + 1) / num_steps) ** 3))


Masker = Callable[[torch.Tensor, int, int], torch.Tensor]


def by_row(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    return reference.keep_in_rows(score_OD, cubic(score_OD.shape[1] // 2, step, num_steps))


def by_matrix(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    return reference.keep_in_matrix(score_OD, cubic(score_OD.numel() // 2, step, num_steps))


def by_group(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """The four highest of eight are safe; of the others, the lowest of the row go first."""
    safe_OD = reference.keep_in_groups(score_OD, 4, 8)
    guarded_OD = score_OD.masked_fill(safe_OD, torch.inf)
    return reference.keep_in_rows(guarded_OD, cubic(score_OD.shape[1] // 2, step, num_steps))


@pytest.mark.parametrize(
    ("scope", "sparsity", "masker"),
    [("row", HALF, by_row), ("matrix", HALF, by_matrix), ("row", FOUR_OF_EIGHT, by_group)],
)
def test_it_chooses_and_moves_as_the_paper_writes_it(scope: str, sparsity: Sparsity, masker: Masker) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = Admm.model_validate({"scope": scope, "choosing": 15, "refining": 0})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    expected_OD, keep_OD = reference.admm(
        weight_OD, gram.gram_DD, step.damping, lambda t, score_OD: masker(score_OD, t, 15), 15
    )
    assert torch.equal(pruned.keep_OD, keep_OD)
    assert distance(updated_OD, expected_OD) < 1e-4


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_correlated_inputs_let_it_err_less_than_sparsegpt_and_than_its_mask_alone(
    scope: str, sparsity: Sparsity
) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    updated_OD, pruned = prune(Admm.model_validate({"scope": scope}), weight_OD, gram_of(x_TD), sparsity)
    other = solve(SparseGPT(), gram_of(x_TD), weight_OD, sparsity)
    assert other.weight_OD is not None
    error = reference.output_error(weight_OD, updated_OD, x_TD)
    assert error < 0.5 * reference.output_error(weight_OD, weight_OD * pruned.keep_OD, x_TD)
    assert error < 0.7 * reference.output_error(weight_OD, other.weight_OD, x_TD)


def test_a_mask_that_grows_errs_less_than_one_chosen_at_once() -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    grown_OD, _ = prune(Admm(refining=60), weight_OD, gram_of(x_TD), HALF)
    at_once_OD, _ = prune(Admm(choosing=1, refining=60), weight_OD, gram_of(x_TD), HALF)
    error, worse = (reference.output_error(weight_OD, pruned_OD, x_TD) for pruned_OD in (grown_OD, at_once_OD))
    assert error < 0.9 * worse


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_mask_of_an_earlier_step_stays_and_its_weights_err_less(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    keep_OD = solve(Wanda(), squares_of(x_TD), weight_OD, sparsity).keep_OD
    updated_OD, pruned = prune(Admm(), weight_OD, gram_of(x_TD), sparsity, keep_OD)
    assert torch.equal(pruned.keep_OD, keep_OD)
    before = reference.output_error(weight_OD, weight_OD * keep_OD, x_TD)
    assert reference.output_error(weight_OD, updated_OD, x_TD) < 0.5 * before


def test_four_of_eight_is_not_two_of_four() -> None:
    _, pruned = prune(Admm(), normal(10, 48, seed=7), gram_of(inputs(48)), FOUR_OF_EIGHT)
    assert not (pruned.keep_OD.reshape(-1, 4).sum(dim=1) == 2).all()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 15),
    sparsity=st.sampled_from(SPARSITIES),
    scope=st.sampled_from(["row", "matrix"]),
    seed=st.integers(0, 99),
)
def test_a_mask_grows_from_share_to_share_up_to_the_whole(
    steps: int, sparsity: Sparsity, scope: str, seed: int
) -> None:
    score_OD = normal(6, 24, seed=seed).abs()
    masks = [grown_mask(score_OD.clone(), sparsity, step / steps, scope) for step in range(steps + 1)]
    assert masks[0].all()
    assert all((larger <= smaller).all() for smaller, larger in pairwise(masks))
    by_hand = solve(Wanda(), squares_of(torch.ones(1, 24)), score_OD, sparsity).keep_OD
    if scope == "row" or isinstance(sparsity, SemiStructured):
        assert torch.equal(masks[-1], by_hand)


@pytest.mark.parametrize("sparsity", [HALF, SemiStructured(keep=2, group=4)])
def test_rows_are_solved_in_slabs_with_the_same_result(sparsity: Sparsity, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OD, gram = normal(10, 24, seed=8), gram_of(inputs(24))
    together_OD, together = prune(Admm(), weight_OD, gram, sparsity)
    monkeypatch.setattr(admm, "FITTED_NUMEL", 3 * 24)
    apart_OD, apart = prune(Admm(), weight_OD, gram, sparsity)
    assert torch.equal(apart.keep_OD, together.keep_OD)
    assert distance(apart_OD, together_OD) < 1e-3


def test_independent_features_make_it_wanda() -> None:
    """But for the ridge: it lifts the multipliers of pruned weights above their sizes."""
    weight_OD, power_D = normal(8, 40, seed=11), torch.logspace(-2, 2, 40)
    updated_OD, pruned = prune(Admm(damping=1e-6), weight_OD, Gram(torch.diag(power_D), num_tokens=1), HALF)
    x_TD = torch.diag(power_D.sqrt())
    assert torch.equal(pruned.keep_OD, solve(Wanda(), squares_of(x_TD), weight_OD, HALF).keep_OD)
    assert distance(updated_OD, weight_OD * pruned.keep_OD) < 1e-6
