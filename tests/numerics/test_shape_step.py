"""How many blocks make up a part of a model, and which parts cannot be made of blocks."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.methods.structured.narrowing import Comp
from pipeline.methods.structured.shape_step import ShortGpt, Sleb


@pytest.mark.parametrize(
    ("num_blocks", "ratio", "num_dropped"),
    [(30, "0.1", 3), (30, "0.2", 6), (10, "0.3", 3), (32, "0.25", 8), (32, "0.24", 7), (3, "0.34", 1), (6, "0.7", 4)],
)
def test_blocks_are_counted_exactly_and_rounded_down(num_blocks: int, ratio: str, num_dropped: int) -> None:
    assert ShortGpt().num_dropped(num_blocks, Fraction(ratio)) == num_dropped


def test_a_part_that_is_no_block_says_which_would_be() -> None:
    rule = "blocks go whole, and the first and the last stay: 28 of 30 may go; ask for 0.0334 to 0.9334, or mask"
    with pytest.raises(ConfigError, match=f"shortgpt is to remove 3.00% of 30 blocks, which is 0 of them; {rule}"):
        ShortGpt().num_dropped(30, Fraction(3, 100))


def test_a_model_of_two_blocks_can_lose_none() -> None:
    with pytest.raises(ConfigError, match=r"sleb is to remove 50\.00% of 2 blocks, .*: 0 of 2 may go, or mask weights"):
        Sleb().num_dropped(2, Fraction(1, 2))


@given(num_blocks=st.integers(3, 120), ratio=st.fractions(Fraction(1, 100), Fraction(99, 100)))
def test_splits_to_try_go_from_no_block_to_all_that_fit_evenly_and_are_few(num_blocks: int, ratio: Fraction) -> None:
    tried = Comp(depth_fraction="auto").nums_dropped(num_blocks, ratio)
    most = Comp(depth_fraction=1.0).num_dropped(num_blocks, ratio)
    assert (tried[0], tried[-1], len(tried)) == (0, most, min(most + 1, 9))
    steps = {after - before for before, after in pairwise(tried)}
    assert not steps or max(steps) - min(steps) <= 1
    assert min(steps, default=1) >= 1


def test_a_number_that_is_named_is_the_only_one() -> None:
    assert Comp(depth_fraction=0.5).nums_dropped(30, Fraction(1, 5)) == [3]
    assert ShortGpt().nums_dropped(30, Fraction(1, 5)) == [6]
