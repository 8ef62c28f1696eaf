"""ALPS against its algorithm written out in float64, and the laws of what it makes."""

import pytest
import torch

from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import Sparsity
from tests import reference
from tests.correlated import distance, gram_of, inputs, normal, squares_of
from tests.fitted import FOUR_OF_EIGHT, HALF, SPARSITIES, prune
from tests.solving import solve


@pytest.mark.parametrize(
    ("scope", "sparsity", "mask"),
    [
        ("row", HALF, lambda t, score_OD: reference.keep_in_rows(score_OD, 20)),
        ("matrix", HALF, lambda t, score_OD: reference.keep_in_matrix(score_OD, 240)),
        ("row", FOUR_OF_EIGHT, lambda t, score_OD: reference.keep_in_groups(score_OD, 4, 8)),
    ],
)
@pytest.mark.parametrize("limit", [1, 7, 300])
def test_it_chooses_and_moves_as_the_paper_writes_it(
    scope: str, sparsity: Sparsity, mask: reference.Masking, limit: int
) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = Alps.model_validate({"scope": scope, "limit": limit, "refining": 0})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    expected_OD, keep_OD = reference.alps(weight_OD, gram.gram_DD, step.damping, mask, limit)
    assert torch.equal(pruned.keep_OD, keep_OD)
    assert distance(updated_OD, expected_OD) < 1e-3


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_correlated_inputs_let_it_err_less_than_admm_and_sparsegpt(scope: str, sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    updated_OD, _ = prune(Alps.model_validate({"scope": scope}), weight_OD, gram_of(x_TD), sparsity)
    admm, sparsegpt = (
        solve(step, gram_of(x_TD), weight_OD, sparsity).weight_OD
        for step in (Admm.model_validate({"scope": scope}), SparseGPT())
    )
    assert admm is not None
    assert sparsegpt is not None
    error = reference.output_error(weight_OD, updated_OD, x_TD)
    assert error < reference.output_error(weight_OD, admm, x_TD)
    assert error < 0.5 * reference.output_error(weight_OD, sparsegpt, x_TD)


def test_a_penalty_that_rises_longer_errs_less_than_one_step() -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    settled_OD, _ = prune(Alps(refining=60), weight_OD, gram_of(x_TD), HALF)
    hasty_OD, _ = prune(Alps(limit=1, refining=60), weight_OD, gram_of(x_TD), HALF)
    error, worse = (reference.output_error(weight_OD, pruned_OD, x_TD) for pruned_OD in (settled_OD, hasty_OD))
    assert error < 0.9 * worse


def test_a_mask_of_an_earlier_step_stays_and_gets_the_same_fit_as_from_admm() -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    keep_OD = solve(Wanda(), squares_of(x_TD), weight_OD, HALF).keep_OD
    updated_OD, pruned = prune(Alps(damping=0.1), weight_OD, gram_of(x_TD), HALF, keep_OD)
    assert torch.equal(pruned.keep_OD, keep_OD)
    same = solve(Admm(damping=0.1, refining=Alps().refining), gram_of(x_TD), weight_OD, HALF, keep_OD)
    assert same.weight_OD is not None
    assert torch.equal(updated_OD, same.weight_OD)
