"""What makes up for gone units: each closed form against the plain least-squares solution it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NumericsError
from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.recovery import (
    LARGEST_FACTOR,
    best_mask,
    best_of,
    bias_of,
    folded,
    is_sound,
    output_error,
    solved,
)
from tests.correlated import distance, inputs, normal

KEEP_D = torch.ones(16, dtype=torch.bool).index_fill_(0, torch.tensor([1, 4, 5, 11, 12]), value=False)


def gram(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.double().T @ x_TD.double()


@pytest.mark.parametrize("damping", [1e-12, 0.01, 0.5])
def test_solved_weights_are_the_ridge_solution_tied_to_the_dense_ones(damping: float) -> None:
    weight_OD, x_TD = normal(6, 16).double(), inputs(16, 50).double()
    x_TK, x_TP = x_TD[:, KEEP_D], x_TD[:, ~KEEP_D]
    ridge = damping * x_TK.square().sum(dim=0).mean()
    # With V = W_S + D, ||X_S V^T - X W^T||^2 + ridge ||D||^2 is a plain least-squares problem in D.
    stacked = torch.cat([x_TK, ridge.sqrt() * torch.eye(x_TK.shape[1])])
    target = torch.cat([x_TP @ weight_OD[:, ~KEEP_D].T, torch.zeros(x_TK.shape[1], 6)])
    expected_OK = weight_OD[:, KEEP_D] + torch.linalg.lstsq(stacked, target).solution.T
    found_OK, used = solved(weight_OD, gram(x_TD), KEEP_D, damping)
    assert used == damping
    assert distance(found_OK, expected_OK) < 1e-8


def test_the_error_of_an_output_is_measured_on_the_output() -> None:
    weight_OD, x_TD, kept_OK = normal(6, 16).double(), inputs(16, 50).double(), normal(6, 11, seed=4).double()
    output_TO = x_TD @ weight_OD.T
    expected = (x_TD[:, KEEP_D] @ kept_OK.T - output_TO).square().sum() / output_TO.square().sum()
    assert output_error(weight_OD, kept_OK, KEEP_D, gram(x_TD)) == pytest.approx(expected.item(), rel=1e-10)
    assert output_error(weight_OD * 0, kept_OK, KEEP_D, gram(x_TD)) == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), damping=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_on_the_tokens_they_were_fitted_to_no_recovery_does_harm_and_more_freedom_does_more(
    seed: int, damping: float
) -> None:
    weight_OD, x_TD = normal(6, 16, seed=seed), normal(60, 16, seed=seed + 1)
    problem = MaskProblem(weight_OD=weight_OD, gram_DD=gram(x_TD))
    none = problem.error(KEEP_D.double())
    masked_OK = folded(weight_OD, problem.tuned(KEEP_D, damping))[:, KEEP_D]
    by_mask = output_error(weight_OD, masked_OK, KEEP_D, gram(x_TD))
    by_weights = output_error(weight_OD, solved(weight_OD, gram(x_TD), KEEP_D, damping)[0], KEEP_D, gram(x_TD))
    assert by_mask <= none * (1 + 1e-9)
    assert by_weights <= none * (1 + 1e-9)
    freest = output_error(weight_OD, solved(weight_OD, gram(x_TD), KEEP_D, 1e-10)[0], KEEP_D, gram(x_TD))
    assert freest <= by_mask * (1 + 1e-6)


@pytest.mark.parametrize("unit_size", [1, 4])
def test_a_folded_mask_is_the_mask(unit_size: int) -> None:
    weight_OD, x_TD, mask_U = normal(6, 16), inputs(16, 30), normal(16 // unit_size, seed=8)
    masked_TD = x_TD * mask_U.repeat_interleave(unit_size)
    assert distance(x_TD.double() @ folded(weight_OD, mask_U).T, masked_TD @ weight_OD.T) < 1e-6


def test_the_bias_is_what_the_gone_features_carried_on_average() -> None:
    weight_OD, x_TD = normal(6, 16).double(), inputs(16, 50).double()
    missing_TO = x_TD @ weight_OD.T - x_TD[:, KEEP_D] @ weight_OD[:, KEEP_D].T
    assert distance(bias_of(weight_OD, KEEP_D, x_TD.mean(dim=0)), missing_TO.mean(dim=0)) < 1e-12


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), LARGEST_FACTOR * 1.01, -LARGEST_FACTOR * 1.01])
def test_a_mask_that_is_not_finite_or_too_large_is_not_taken(entry: float) -> None:
    mask_U = torch.tensor([1.0, 0.0, entry])
    held_out = MaskProblem(weight_OD=torch.ones(1, 3), gram_DD=torch.eye(3))
    keep_U = torch.tensor([True, False, True])
    assert not is_sound(mask_U)
    assert torch.equal(best_mask(keep_U, [mask_U], held_out), keep_U.double())


def test_a_mask_is_taken_only_where_it_helps_on_tokens_it_was_not_fitted_to() -> None:
    weight_OD, keep_U = normal(6, 16), KEEP_D
    language_DD, another_DD = normal(16, 16, seed=9), normal(16, 16, seed=7)
    seen, alike = (normal(400, 16, seed=seed) @ language_DD for seed in (1, 2))
    other = normal(400, 16, seed=3) @ another_DD
    mask_U = MaskProblem(weight_OD=weight_OD, gram_DD=gram(seen)).tuned(keep_U, 0.01)
    for x_TD, helps in [(alike, True), (other, False)]:
        held_out = MaskProblem(weight_OD=weight_OD, gram_DD=gram(x_TD))
        assert (held_out.error(mask_U) < held_out.error(keep_U.double())) is helps
        assert torch.equal(best_mask(keep_U, [mask_U], held_out), mask_U if helps else keep_U.double())


def test_of_equal_candidates_the_first_is_taken() -> None:
    assert best_of(["none", "mask", "other"], lambda name: {"none": 2.0}.get(name, 1.0)) == "mask"


def test_a_ridge_is_raised_until_the_weights_can_be_solved_for_or_they_are_refused() -> None:
    mendable, hopeless = (torch.kron(torch.eye(8), torch.tensor([[1.0, c], [c, 1.0]])) for c in (1.05, 3.0))
    keep_D = torch.arange(16) < 12
    assert solved(normal(2, 16), mendable, keep_D, 0.01)[1] == pytest.approx(0.1)
    with pytest.raises(NumericsError, match=r"Gram matrix of 12 input features could not be factorised"):
        solved(normal(2, 16), hopeless, keep_D, 0.01)


def test_features_that_were_never_active_leave_the_weights_alone() -> None:
    weight_OD = normal(6, 16)
    assert torch.equal(solved(weight_OD, torch.zeros(16, 16), KEEP_D, 0.5)[0], weight_OD[:, KEEP_D].double())
