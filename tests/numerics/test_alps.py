"""ALPS against its algorithm written out in float64, and the laws of what it makes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import PrunedLinear
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import Gram
from tests import reference
from tests.correlated import DEAD, distance, gram_of, inputs, normal, squares_of, with_dead_features
from tests.solving import solve

HALF = Unstructured(ratio=0.5)
FOUR_OF_EIGHT = SemiStructured(keep=4, group=8)
SPARSITIES = [HALF, Unstructured(ratio=0.7), SemiStructured(keep=2, group=4), FOUR_OF_EIGHT]


def prune(
    step: Alps, weight_OD: torch.Tensor, gram: Gram, sparsity: Sparsity, keep_OD: torch.Tensor | None = None
) -> tuple[torch.Tensor, PrunedLinear]:
    pruned = solve(step, gram, weight_OD, sparsity, keep_OD)
    assert pruned.weight_OD is not None
    assert not pruned.weight_OD[~pruned.keep_OD].any()
    return pruned.weight_OD, pruned


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
def test_what_it_keeps_is_the_least_squares_fit_on_its_mask(scope: str, sparsity: Sparsity) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = Alps.model_validate({"scope": scope, "refining": 60})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    hessian_DD = reference.power_hessian(gram.gram_DD, step.damping)
    assert distance(updated_OD, reference.fitted_rows(weight_OD, pruned.keep_OD, hessian_DD)) < 1e-4


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


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 30)),
    percent=st.integers(0, 99),
    scope=st.sampled_from(["row", "matrix"]),
    limit=st.integers(1, 20),
    num_tokens=st.integers(1, 60),
)
def test_counts_are_exact(shape: tuple[int, int], percent: int, scope: str, limit: int, num_tokens: int) -> None:
    weight_OD, step = normal(*shape, seed=13), Alps.model_validate({"scope": scope, "limit": limit})
    _, pruned = prune(step, weight_OD, gram_of(inputs(shape[1], num_tokens)), Unstructured(ratio=percent / 100))
    units = pruned.keep_OD if scope == "row" else pruned.keep_OD.reshape(1, -1)
    assert ((~units).sum(dim=1) == percent * units.shape[1] // 100).all()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (3, 7)])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_pattern_holds_in_every_group(keep: int, group: int, scope: str) -> None:
    step, weight_OD = Alps.model_validate({"scope": scope}), normal(10, 6 * group, seed=7)
    _, pruned = prune(step, weight_OD, gram_of(inputs(6 * group)), SemiStructured(keep=keep, group=group))
    assert (pruned.keep_OD.reshape(-1, group).sum(dim=1) == keep).all()


@pytest.mark.parametrize("scale", [2.0**-16, 2.0**16])
def test_the_scale_of_the_inputs_changes_nothing(scale: float) -> None:
    weight_OD, gram = normal(10, 24, seed=8), gram_of(inputs(24))
    expected_OD, expected = prune(Alps(), weight_OD, gram, HALF)
    updated_OD, pruned = prune(Alps(), weight_OD, Gram(gram.gram_DD * scale, gram.num_tokens), HALF)
    assert torch.equal(pruned.keep_OD, expected.keep_OD)
    assert torch.equal(updated_OD, expected_OD)


def test_dead_features_go_first_and_stay_as_they_are_where_they_survive() -> None:
    weight_OD, gram = normal(10, 20, seed=15), gram_of(with_dead_features(inputs(20)))
    _, pruned = prune(Alps(), weight_OD, gram, Unstructured(ratio=0.1))
    assert (~pruned.keep_OD).any(dim=0).nonzero().flatten().tolist() == DEAD
    updated_OD, pruned = prune(Alps(), weight_OD, gram, Unstructured(ratio=0.05))
    assert not pruned.keep_OD[:, DEAD[0]].any()
    assert torch.equal(updated_OD[:, DEAD[1]], weight_OD[:, DEAD[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept_and_the_dense_weight_left_alone(dtype: torch.dtype) -> None:
    weight_OD = normal(40, 8, seed=14).to(dtype).T
    before_OD = weight_OD.clone()
    updated_OD, _ = prune(Alps(), weight_OD, gram_of(inputs(40)), HALF)
    assert updated_OD.dtype == dtype
    assert torch.equal(weight_OD, before_OD)


def test_the_damping_that_was_needed_is_noted() -> None:
    indefinite = Gram(torch.kron(torch.eye(4), torch.tensor([[1.0, 1.05], [1.05, 1.0]])), num_tokens=1)
    _, pruned = prune(Alps(damping=0.01), normal(6, 8, seed=19), indefinite, HALF)
    assert pruned.notes["damping"] == pytest.approx(0.1)
