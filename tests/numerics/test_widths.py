"""How narrow blocks become: parameters counted by hand, and the laws of the shares."""

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.methods.structured.widths import (
    MOST,
    MULTIPLES,
    ROUNDING,
    rounded_width,
    share_of_neurons,
    shares_by_importance,
    widths_by_importance,
    with_unmet,
)

BLOCK, NEURON, WIDTH = 3_540_096, 3 * 576, 1536
"""SmolLM2-135M: numbers in a block, in one neuron, and neurons."""

FIFTH = Fraction(1, 5)


def share(ratio: Fraction, num_dropped: int) -> Fraction:
    return share_of_neurons(
        ratio, num_blocks=30, num_dropped=num_dropped, block_numel=BLOCK, neuron_numel=NEURON, width=WIDTH
    )


@given(ratio=st.fractions(0, Fraction(6, 10)), num_dropped=st.integers(0, 20))
def test_blocks_and_neurons_together_hold_what_is_to_go(ratio: Fraction, num_dropped: int) -> None:
    neurons = share(ratio, num_dropped) * WIDTH * NEURON * (30 - num_dropped)
    assert num_dropped * BLOCK + neurons == max(ratio * 30 * BLOCK, num_dropped * BLOCK)


@pytest.mark.parametrize(("num_dropped", "percent"), [(0, 26.7), (3, 14.8), (6, 0.0)])
def test_a_fifth_of_the_demo_model_is_what_the_specification_says(num_dropped: int, percent: float) -> None:
    assert float(share(FIFTH, num_dropped)) * 100 == pytest.approx(percent, abs=0.06)


def test_what_the_neurons_do_not_hold_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"removing 70.0% .* with 0 of 30 blocks gone leaves 93.4% .*depth_fraction"):
        share(Fraction(7, 10), 0)


@pytest.mark.parametrize(
    ("width", "lost", "expected"),
    [
        (11008, FIFTH, 8704),
        (14336, FIFTH, 11264),
        (1536, Fraction(267, 1000), 1120),
        (48, FIFTH, 38),
        (1536, Fraction(0), 1536),
    ],
)
def test_a_width_is_rounded_down_to_what_kernels_like_if_that_costs_little(
    width: int, lost: Fraction, expected: int
) -> None:
    assert rounded_width(width, lost) == expected


@given(width=st.integers(16, 30_000), lost=st.fractions(0, MOST))
def test_rounding_never_keeps_more_and_takes_little_more(width: int, lost: Fraction) -> None:
    exact = width * (1 - lost)
    found = rounded_width(width, lost)
    assert found <= exact
    assert exact - found <= max(1, ROUNDING * width)


def test_a_multiple_may_be_named() -> None:
    assert rounded_width(1536, FIFTH, 256) == 1024
    assert all(rounded_width(11008, FIFTH, multiple) % multiple == 0 for multiple in MULTIPLES)


def test_a_multiple_above_all_that_is_left_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"153 of 1536 neurons would be left, fewer than the multiple of 256"):
        rounded_width(1536, MOST, 256)


@given(
    importance=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    mean=st.fractions(0, MOST),
    spread=st.fractions(0, 1),
)
def test_shares_have_the_mean_that_is_asked_and_fall_with_importance(
    importance: list[float], mean: Fraction, spread: Fraction
) -> None:
    shares = shares_by_importance(mean, importance, spread)
    assert sum(shares) == mean * len(shares)
    assert all(0 <= share <= MOST for share in shares)
    ordered = sorted(zip(importance, shares, strict=True), key=lambda pair: (pair[0], -pair[1]))
    assert all(a[1] >= b[1] for a, b in pairwise(ordered))


def test_without_a_spread_all_lose_the_same() -> None:
    assert shares_by_importance(FIFTH, [0.1, 0.5, 0.2], Fraction(0)) == [FIFTH] * 3


def test_shares_follow_the_formula() -> None:
    shares = shares_by_importance(FIFTH, [0.0, 0.5, 1.0], Fraction(3, 10))
    assert shares == [FIFTH * Fraction(13, 10), FIFTH, FIFTH * Fraction(7, 10)]


def test_a_block_that_stands_out_leaves_the_others_their_differences() -> None:
    importance, spread = [0.98, 0.02, 0.04, 0.03], Fraction(3, 10)
    counted = shares_by_importance(FIFTH, importance, spread)
    aside = shares_by_importance(FIFTH, importance, spread, frozenset({0}))
    assert aside[1] - aside[2] > 10 * (counted[1] - counted[2])
    assert aside[0] == min(aside)


def textbook_widths(width: int, mean: float, importance: list[float], spread: float, multiple: int) -> list[int]:
    """Of blocks none of which meets a bound: each exact width rounded down, the largest rests then rounded up."""
    others = importance[1:]
    middle = sum(others) / len(others)
    furthest = max(abs(score - middle) for score in others)
    lost = [1 - spread * max(-1.0, min(1.0, (score - middle) / furthest)) for score in importance]
    lost = [mean * part - mean * (sum(lost) / len(lost) - 1) for part in lost]
    exact = [width * (1 - part) / multiple for part in lost]
    whole = [int(number) for number in exact]
    num_more = int(sum(exact) + 1e-9) - sum(whole)
    by_rest = sorted(range(len(exact)), key=lambda block: whole[block] - exact[block])
    return [multiple * (whole[block] + (block in by_rest[:num_more])) for block in range(len(exact))]


@pytest.mark.parametrize(("width", "multiple"), [(1536, 16), (11008, 128), (1536, 64)])
def test_widths_follow_the_textbook(width: int, multiple: int) -> None:
    importance = [0.98, 0.31, 0.24, 0.05, 0.043, 0.04, 0.061, 0.12, 0.25]
    named = None if multiple <= ROUNDING * width else multiple
    found = widths_by_importance(width, FIFTH, importance, Fraction(3, 10), named)
    assert found == textbook_widths(width, 0.2, importance, 0.3, multiple)
    assert len(set(found)) >= 4
    assert max(found) == found[0], "the first block stands out, and keeps as much as any"


@given(
    width=st.integers(16, 30_000),
    importance=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    mean=st.fractions(0, MOST),
    spread=st.fractions(0, 1),
)
def test_widths_keep_together_what_is_asked_to_the_multiple(
    width: int, importance: list[float], mean: Fraction, spread: Fraction
) -> None:
    widths, level = (widths_by_importance(width, mean, importance, s) for s in (spread, Fraction(0)))
    multiple = next((m for m in MULTIPLES if width % m == 0 and m <= ROUNDING * width), 1)
    exact = width * (1 - mean) * len(importance)
    assert sum(widths) == sum(level) == floor(exact / multiple) * multiple
    assert all(0 < own <= width and own % multiple == 0 for own in widths)
    ordered = sorted(zip(importance[1:], widths[1:], strict=True))
    assert all(b[1] - a[1] >= -multiple for a, b in pairwise(ordered)), "but for rounding, more for what matters more"


@given(multiple=st.integers(1, 9), share=st.fractions(0, 1), spread=st.fractions(0, 1))
def test_a_multiple_that_does_not_divide_the_width_is_kept_to_within_it(
    multiple: int, share: Fraction, spread: Fraction
) -> None:
    mean, importance = share * Fraction(1, 2), [0.3, 0.1, 0.9, 0.5]
    widths, level = (widths_by_importance(100, mean, importance, s, multiple) for s in (spread, Fraction(0)))
    assert sum(widths) == sum(level) <= 400 * (1 - mean)
    assert all(0 < own <= 100 and own % multiple == 0 for own in widths)


def test_a_block_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"30 of 100 neurons would be left of a block, fewer than the multiple of 64"):
        widths_by_importance(100, Fraction(1, 2), [0.5, 0.9, 0.1, 0.2], Fraction(1), 64)


@pytest.mark.parametrize(("own", "unmet", "expected"), [(10, 0, 10), (10, 30, 40), (10, 200, 90), (95, 3, 95)])
def test_what_one_block_has_kept_others_lose_as_far_as_they_may(own: int, unmet: int, expected: int) -> None:
    assert with_unmet(own, unmet, width=100) == expected
