"""The least-squares problem of a mask against the outputs themselves, in float64."""

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.methods.structured import mask_problem
from pipeline.methods.structured.mask_problem import MaskProblem
from tests import removal
from tests.correlated import DEAD, distance, inputs, normal, with_dead_features

SIZES = pytest.mark.parametrize("unit_size", [1, 4])


def problem_of(weight_OD: torch.Tensor, x_TD: torch.Tensor, unit_size: int = 1) -> MaskProblem:
    return MaskProblem(weight_OD=weight_OD, gram_DD=x_TD.double().T @ x_TD.double(), unit_size=unit_size)


def kept(num_units: int, num_gone: int) -> torch.Tensor:
    order = torch.rand(num_units, generator=torch.Generator().manual_seed(3)).argsort()
    return torch.ones(num_units, dtype=torch.bool).index_fill_(0, order[:num_gone], value=False)


@SIZES
@pytest.mark.parametrize("slab", [1, 1 << 20])
def test_the_coupling_is_that_of_what_units_carry_to_the_output(
    unit_size: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_problem, "SLAB_NUMEL", slab)
    weight_OD, x_TD = normal(5, 16), inputs(16, 40)
    a_NU, problem = removal.carried(weight_OD, x_TD, unit_size), problem_of(weight_OD, x_TD, unit_size)
    assert distance(problem.coupling(), a_NU.T @ a_NU) < 1e-12
    assert distance(problem.sizes(), a_NU.square().sum(dim=0)) < 1e-12


@SIZES
def test_the_error_of_a_mask_is_that_of_the_output(unit_size: int) -> None:
    weight_OD, x_TD = normal(5, 16), inputs(16, 40)
    mask_U = 1 + 0.1 * normal(16 // unit_size, seed=7).double()
    output_TO = x_TD.double() @ weight_OD.double().T
    masked_TO = (x_TD.double() * mask_U.repeat_interleave(unit_size)) @ weight_OD.double().T
    expected = (masked_TO - output_TO).square().sum() / output_TO.square().sum()
    assert problem_of(weight_OD, x_TD, unit_size).error(mask_U) == pytest.approx(expected.item(), rel=1e-10)


def test_where_nothing_reaches_the_output_nothing_is_lost() -> None:
    problem = MaskProblem(weight_OD=torch.zeros(5, 8), gram_DD=torch.eye(8))
    assert problem.error(torch.zeros(8)) == 0
    assert torch.equal(problem.tuned(kept(8, 3), 0.01), kept(8, 3).double())


@SIZES
@pytest.mark.parametrize("damping", [1e-12, 0.01, 0.5])
def test_the_tuned_mask_is_the_best_of_all_masks(unit_size: int, damping: float) -> None:
    weight_OD, x_TD = normal(6, 24), inputs(24, 50)
    problem, keep_U = problem_of(weight_OD, x_TD, unit_size), kept(24 // unit_size, 2)
    a_NU = removal.carried(weight_OD, x_TD, unit_size)
    ridge = damping * float(a_NU[:, keep_U].square().sum(dim=0).mean())
    expected_U = removal.best_mask(a_NU, (~keep_U).nonzero()[:, 0].tolist(), ridge)
    assert distance(problem.tuned(keep_U, damping), expected_U) < 1e-8


def test_the_tuned_mask_does_not_depend_on_how_many_rows_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, keep_U = problem_of(normal(6, 24), inputs(24, 50)), kept(24, 7)
    together_U = problem.tuned(keep_U, 0.01)
    monkeypatch.setattr(mask_problem, "SLAB_NUMEL", 24 * 5)
    assert distance(problem.tuned(keep_U, 0.01), together_U) < 1e-12


def test_a_mask_that_may_be_tuned_errs_less_than_ones() -> None:
    problem, keep_U = problem_of(normal(6, 24), inputs(24, 200)), kept(24, 6)
    assert problem.error(problem.tuned(keep_U, 0.01)) < problem.error(keep_U.double())


def test_the_inverse_is_that_of_the_damped_coupling() -> None:
    problem = problem_of(normal(6, 24), with_dead_features(inputs(24, 50)))
    coupling_UU = problem.coupling()
    ridge_UU = 0.01 * coupling_UU.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    inverse_UU, used = problem.inverse(0.01)
    assert used == 0.01
    assert problem.ridge(0.01) == pytest.approx(ridge_UU[0, 0].item(), rel=1e-12)
    assert distance(inverse_UU, torch.linalg.inv(coupling_UU + ridge_UU)) < 1e-9
    assert inverse_UU.diagonal()[DEAD] == pytest.approx(1 / ridge_UU[0, 0].item())


def test_the_weights_and_the_statistic_stay_as_they_were() -> None:
    weight_OD, gram_DD = normal(6, 24), inputs(24, 50).T @ inputs(24, 50)
    before = weight_OD.clone(), gram_DD.clone()
    problem = MaskProblem(weight_OD=weight_OD, gram_DD=gram_DD)
    problem.inverse(0.01)
    problem.tuned(kept(24, 5), 0.01)
    assert torch.equal(weight_OD, before[0])
    assert torch.equal(gram_DD, before[1])


def test_a_matrix_that_no_ridge_mends_is_refused() -> None:
    indefinite_DD = torch.kron(torch.eye(4), torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    problem = MaskProblem(weight_OD=torch.ones(1, 8), gram_DD=indefinite_DD)
    with pytest.raises(NumericsError, match=r"Gram matrix of 8 input features could not be factorised"):
        problem.inverse(0.01)
    with pytest.raises(NumericsError, match=r"Gram matrix of 6 input features could not be factorised"):
        problem.tuned(torch.arange(8) < 6, 0.01)
