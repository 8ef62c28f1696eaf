"""Fitting kept weights: conjugate gradients and ADMM against one dense least-squares solve a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NumericsError
from pipeline.methods.least_squares import LeastSquares, fit, split_step
from pipeline.methods.step import LinearView
from pipeline.sparsity import Unstructured
from tests import reference
from tests.correlated import DEAD, distance, gram_of, inputs, normal, with_dead_features

HALF = Unstructured(ratio=0.5)
DAMPING = 0.1


def never(dense_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("the mask is given")


def refined(
    weight_OD: torch.Tensor, keep_OD: torch.Tensor, gram_DD: torch.Tensor, num_steps: int, rows: int | None = None
) -> torch.Tensor:
    view = LinearView(dense_OD=weight_OD, sparsity=HALF, keep_OD=keep_OD)
    pruned = fit(view, LeastSquares.of(gram_DD, DAMPING), never, num_steps, rows)
    assert pruned.weight_OD is not None
    assert torch.equal(pruned.keep_OD, keep_OD)
    return pruned.weight_OD


def errors(weight_OD: torch.Tensor, dense_OD: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
    return reference.squared_error(weight_OD, dense_OD, reference.power_hessian(gram_DD, DAMPING))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_conjugate_gradients_end_at_the_least_squares_solution_on_the_mask(density: float) -> None:
    weight_OD, gram_DD = normal(12, 40, seed=4), gram_of(inputs(40)).gram_DD
    keep_OD = torch.rand(12, 40, generator=torch.Generator().manual_seed(5)) < density
    expected_OD = reference.fitted_rows(weight_OD, keep_OD, reference.power_hessian(gram_DD, DAMPING))
    assert distance(refined(weight_OD, keep_OD, gram_DD, 60), expected_OD) < 1e-4


def test_admm_on_a_fixed_mask_ends_there_too() -> None:
    weight_OD, gram_DD = normal(12, 40, seed=4), gram_of(inputs(40)).gram_DD
    keep_OD = normal(12, 40, seed=5) > 0
    problem = LeastSquares.of(gram_DD, DAMPING)
    dense_OD = problem.scaled(weight_OD)
    state_OD, inverse_DD = dense_OD.clone(), problem.inverse(1.0)
    for _ in range(1000):
        split_step(state_OD, keep_OD, dense_OD, inverse_DD, 1.0)
    expected_OD = reference.fitted_rows(weight_OD, keep_OD, reference.power_hessian(gram_DD, DAMPING))
    assert distance(problem.unscaled(state_OD, weight_OD, keep_OD), expected_OD) < 1e-4


@settings(max_examples=40, deadline=None)
@given(
    num_columns=st.integers(2, 24),
    num_tokens=st.integers(1, 60),
    percent=st.integers(0, 100),
    seed=st.integers(0, 1000),
    num_steps=st.integers(0, 30),
)
def test_no_step_of_conjugate_gradients_errs_more_than_the_one_before(
    num_columns: int, num_tokens: int, percent: int, seed: int, num_steps: int
) -> None:
    weight_OD = normal(5, num_columns, seed=seed)
    keep_OD = torch.rand(5, num_columns, generator=torch.Generator().manual_seed(seed)) < percent / 100
    gram_DD = gram_of(inputs(num_columns, num_tokens)).gram_DD
    before_OD, after_OD = (refined(weight_OD, keep_OD, gram_DD, n) for n in (num_steps, num_steps + 1))
    tolerance = 1e-5 * errors(weight_OD * keep_OD, weight_OD, gram_DD) + 1e-6 * errors(
        0 * weight_OD, weight_OD, gram_DD
    )
    assert (errors(after_OD, weight_OD, gram_DD) <= errors(before_OD, weight_OD, gram_DD) + tolerance).all()
    assert not after_OD[~keep_OD].any()


def test_it_starts_from_what_the_steps_before_have_left_and_aims_at_the_dense_weights() -> None:
    weight_OD, gram_DD = normal(6, 20, seed=6), gram_of(inputs(20)).gram_DD
    keep_OD = normal(6, 20, seed=7) > 0
    updated_OD = normal(6, 20, seed=8) * keep_OD
    view = LinearView(dense_OD=weight_OD, sparsity=HALF, keep_OD=keep_OD, updated_OD=updated_OD)
    problem = LeastSquares.of(gram_DD, DAMPING)
    untouched, settled = (fit(view, problem, never, n).weight_OD for n in (0, 40))
    assert untouched is not None
    assert settled is not None
    assert distance(untouched, updated_OD) < 1e-6
    expected_OD = reference.fitted_rows(weight_OD, keep_OD, reference.power_hessian(gram_DD, DAMPING))
    assert distance(settled, expected_OD) < 1e-4


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_rows_solved_apart_give_what_they_give_together(rows: int) -> None:
    weight_OD, keep_OD, gram_DD = normal(9, 20, seed=9), normal(9, 20, seed=10) > 0, gram_of(inputs(20)).gram_DD
    apart_OD, together_OD = (refined(weight_OD, keep_OD, gram_DD, 10, at_once) for at_once in (rows, None))
    assert distance(apart_OD, together_OD) < 1e-5


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_scale_of_the_inputs_changes_nothing(scale: float) -> None:
    weight_OD, keep_OD, gram_DD = normal(6, 20, seed=9), normal(6, 20, seed=10) > 0, gram_of(inputs(20)).gram_DD
    assert torch.equal(refined(weight_OD, keep_OD, gram_DD * scale, 10), refined(weight_OD, keep_OD, gram_DD, 10))


def test_the_inverse_is_that_of_the_scaled_damped_matrix() -> None:
    gram_DD = gram_of(with_dead_features(inputs(30))).gram_DD
    problem = LeastSquares.of(gram_DD, DAMPING)
    norm_D = gram_DD.double().diagonal().sqrt().masked_fill(gram_DD.diagonal() == 0, 1)
    expected_DD = gram_DD.double() / torch.outer(norm_D, norm_D) + (DAMPING + 0.5) * torch.eye(30, dtype=torch.float64)
    assert distance(problem.inverse(0.5), torch.linalg.inv(expected_DD)) < 1e-5
    point_RD = normal(3, 30)
    assert distance(problem.times(point_RD), point_RD.double() @ (expected_DD - 0.5 * torch.eye(30))) < 1e-5


def test_kept_weights_of_dead_features_stay_as_they_were() -> None:
    weight_OD, gram_DD = normal(6, 20, seed=11), gram_of(with_dead_features(inputs(20))).gram_DD
    keep_OD = normal(6, 20, seed=12) > 0
    updated_OD = refined(weight_OD, keep_OD, gram_DD, 10)
    assert torch.equal(updated_OD[:, DEAD], (weight_OD * keep_OD)[:, DEAD])


def test_inputs_that_were_never_active_leave_every_kept_weight_alone() -> None:
    weight_OD, keep_OD = normal(6, 10, seed=13), normal(6, 10, seed=14) > 0
    assert torch.equal(refined(weight_OD, keep_OD, torch.zeros(10, 10), 5), weight_OD * keep_OD)


def pairwise(off_diagonal: float) -> torch.Tensor:
    """A Gram matrix that rounding has made indefinite: eigenvalues 1 + and 1 - `off_diagonal`."""
    return torch.kron(torch.eye(4), torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]]))


@pytest.mark.parametrize(("off_diagonal", "needed"), [(0.9, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_the_ridge_grows_until_the_problem_is_convex(off_diagonal: float, needed: float) -> None:
    assert LeastSquares.of(pairwise(off_diagonal), 0.01).damping == pytest.approx(needed)


def test_a_matrix_that_no_ridge_mends_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"Gram matrix of 8 input features could not be factorised"):
        LeastSquares.of(pairwise(3.0), 0.01)
