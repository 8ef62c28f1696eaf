"""Sizes and durations, at the edges of their units."""

from fractions import Fraction
from math import floor

import pytest

from pipeline.human import human_bytes, human_part, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (9_400_000, "9.4 MB"), (1.71e9, "1.71 GB"), (2e12, "2 TB")],
)
def test_a_size_has_three_digits_and_a_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (42.4, "42 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min")]
)
def test_a_duration_has_the_units_that_matter(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize("of", range(2, 200))
def test_a_part_that_is_told_makes_up_for_the_number_that_is_meant(of: int) -> None:
    assert [floor(Fraction(human_part(number, of)) * of) for number in range(1, of)] == list(range(1, of))
