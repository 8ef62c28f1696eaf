"""The damping rises tenfold until a factorisation succeeds, and stops at its limit."""

from collections.abc import Callable

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.methods.factorise import factor_in_place, rising, solve_factored, with_damping_enough
from tests.correlated import normal

DIAGONAL = torch.full((8,), 3.0)


def succeeds_from(least: float, tried: list[float]) -> Callable[[float], torch.Tensor | None]:
    def factorise(damping: float) -> torch.Tensor | None:
        tried.append(damping)
        return torch.full((1, 1), damping) if damping >= least else None

    return factorise


def test_it_rises_to_the_limit_itself() -> None:
    assert list(rising(0.25)) == [0.25, 1.0]
    assert list(rising(1.0)) == [1.0]
    assert list(rising(0.01)) == pytest.approx([0.01, 0.1, 1.0])


def test_the_first_that_suffices_is_taken_and_returned() -> None:
    tried: list[float] = []
    factor, used = with_damping_enough(succeeds_from(0.2, tried), 0.03, DIAGONAL)
    assert tried == pytest.approx([0.03, 0.3])
    assert used == pytest.approx(0.3)
    assert factor.item() == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_does_not_suffice(bad: float) -> None:
    _, used = with_damping_enough(lambda d: torch.tensor([[bad if d < 0.1 else 1.0]]), 0.01, DIAGONAL)
    assert used == pytest.approx(0.1)


def test_where_nothing_suffices_the_numbers_and_the_ways_out_are_named() -> None:
    message = (
        r"Gram matrix of 8 input features could not be factorised with any damping from 0\.01 to 1 of its mean "
        r"diagonal 3; use more calibration tokens, or a method without a factorisation \(wanda, besa\)"
    )
    with pytest.raises(NumericsError, match=message):
        with_damping_enough(lambda damping: None, 0.01, DIAGONAL)


def test_a_factor_takes_the_place_of_its_matrix_and_solves_with_it() -> None:
    x_TD, right_DN = normal(40, 9).double(), normal(9, 4, seed=1).double()
    matrix_DD = x_TD.T @ x_TD
    expected_DN = torch.linalg.solve(matrix_DD + 0.5 * torch.eye(9, dtype=torch.float64), right_DN)
    address = matrix_DD.data_ptr()
    lower_DD = factor_in_place(matrix_DD, 0.5)
    assert lower_DD is not None
    assert lower_DD.data_ptr() == address
    assert torch.equal(lower_DD, lower_DD.tril())
    assert torch.allclose(solve_factored(lower_DD, right_DN), expected_DN, rtol=1e-10, atol=1e-10)


def test_a_matrix_that_is_not_positive_definite_has_no_factor() -> None:
    assert factor_in_place(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.5) is None
