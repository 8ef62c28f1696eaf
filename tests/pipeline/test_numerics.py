"""Small numerical helpers: what counts as finite, and which block an error is of."""

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.numerics import all_finite, naming_block


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found(bad: float) -> None:
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert all_finite(tensor)
    assert all_finite(tensor[:0])
    assert all_finite(tensor.T)
    tensor[1, 2] = bad
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)


def test_an_error_of_numbers_gets_the_number_of_its_block_and_others_stay_as_they_are() -> None:
    with pytest.raises(NumericsError, match=r"^block 3: q_proj holds NaN$"), naming_block(3):
        raise NumericsError("q_proj holds NaN")
    with pytest.raises(ValueError, match=r"^no number$"), naming_block(3):
        raise ValueError("no number")
