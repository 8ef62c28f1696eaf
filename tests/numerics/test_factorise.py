"""The damping rises tenfold until a factorisation succeeds, and stops at its limit."""

from collections.abc import Callable

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.methods.factorise import rising, with_damping_enough

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
