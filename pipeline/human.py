"""Sizes and durations as people read them."""

from fractions import Fraction
from math import ceil


def human_bytes(count: float) -> str:
    """Return a size for people: 1.71 GB, 9.4 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """Return a duration for people: 42 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def human_part(number: int, of: int) -> str:
    """Return `0.3334` for 1 of 3: rounded up, so that so much of `of` things is that number of them, rounded down."""
    return f"{ceil(Fraction(10_000 * number, of)) / 10_000:g}"
