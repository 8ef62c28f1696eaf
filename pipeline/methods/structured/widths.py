"""How narrow blocks become: one width for all, rounded to what kernels like, or each by its importance.

What is to be removed is a part of the parameters of all blocks. Whole blocks take what they hold; the neurons of the
blocks that stay give the rest. Everything is worked out in whole numbers and fractions, so that it is the same
everywhere. A *neuron* is an input feature of the linear that leads out of the MLP, with the rows that make it.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

from pipeline.allocation import centred, rounded
from pipeline.errors import ConfigError

MULTIPLES = (256, 128, 64, 32, 16, 8)
"""Widths that quantisers and kernels like, the best first: groups of GPTQ and AWQ are of 128, blocks of GGUF of 256."""

ROUNDING = Fraction(1, 64)
"""The largest part of the dense width that rounding may take beyond what was asked."""

MOST = Fraction(9, 10)
"""The largest part of its neurons that a block may lose."""


def share_of_neurons(
    ratio: Fraction,
    *,
    num_blocks: int,
    num_dropped: int,
    block_numel: int,
    neuron_numel: int,
    width: int,
    heads_numel: int = 0,
) -> Fraction:
    """Return the part of their neurons that the blocks that stay are to lose; 0 where whole blocks are enough.

    ratio: part of all blocks' parameters that is to go; neuron_numel: parameters of one neuron; heads_numel: those that
    go with the heads of a block that stays. Raises ConfigError where the neurons do not hold that much, and where heads
    leave none of it to them.
    """
    num_left = num_blocks - num_dropped
    gone = num_dropped * block_numel + num_left * heads_numel
    left_over = max(Fraction(0), ratio * num_blocks * block_numel - gone)
    if heads_numel and not left_over:
        raise ConfigError(
            f"{float(ratio):.2%} of the blocks' parameters is to go, and the heads that go, with {num_dropped} of "
            f"{num_blocks} blocks, are {gone / (num_blocks * block_numel):.2%} already, which leaves nothing for "
            "neurons to give; ask for more than that, or remove fewer heads, or fewer whole blocks (depth_fraction)"
        )
    share = left_over / (num_left * neuron_numel * width)
    if share > MOST:
        raise ConfigError(
            f"removing {float(ratio):.1%} of the blocks' parameters with {num_dropped} of {num_blocks} blocks gone "
            f"leaves {float(share):.1%} of the neurons to go, above the most a block may lose, {float(MOST):.0%}; "
            "remove less, or more of it by whole blocks (depth_fraction)"
        )
    return share


def rounded_width(width: int, share: Fraction, multiple: int | None = None) -> int:
    """Return the width that is left when that share of the neurons goes, rounded down to a multiple.

    Where none is named it is the largest of MULTIPLES that takes no more than ROUNDING of the width beyond what was
    asked; 1 where none does. Nothing to remove leaves the width as it is. Raises ConfigError where nothing is left.
    """
    exact = width * (1 - share)
    if share == 0:
        return width
    if multiple is None:
        fitting = (m for m in MULTIPLES if m <= exact and exact % m <= ROUNDING * width)
        multiple = next(fitting, 1)
    if exact < multiple:
        raise ConfigError(
            f"{floor(exact)} of {width} neurons would be left, fewer than the multiple of {multiple} that a width is "
            "rounded down to; name a smaller `multiple`, or remove less"
        )
    return floor(exact / multiple) * multiple


def widths_by_importance(
    width: int, mean: Fraction, importance: Sequence[float], spread: Fraction, multiple: int | None = None
) -> list[int]:
    """Return the width that is left of each of some blocks where their mean share of neurons goes, by importance.

    importance: of the blocks that stay, the model's first before all others; it is set aside. Each width is less than
    a multiple from the exact one, and all together are the largest number of multiples that keeps no more than is
    asked. Where no multiple is named, it is the largest of MULTIPLES that divides the dense width and is no more than
    ROUNDING of it; 1 where none is. Raises ConfigError where nothing is left of a block.
    """
    if multiple is None:
        multiple = next((m for m in MULTIPLES if width % m == 0 and m <= ROUNDING * width), 1)
    most = width // multiple
    least_share = 1 - Fraction(most * multiple, width)
    shares = shares_by_importance(mean, importance, spread, frozenset({0}), least_share)
    whole = rounded([min(Fraction(most), width * (1 - share) / multiple) for share in shares], [1] * len(shares))
    if min(whole) == 0:
        raise ConfigError(
            f"{floor(width * (1 - max(shares)))} of {width} neurons would be left of a block, fewer than the multiple "
            f"of {multiple} that widths are rounded to; name a smaller `multiple` or `spread`, or remove less"
        )
    return [number * multiple for number in whole]


def shares_by_importance(
    mean: Fraction,
    importance: Sequence[float],
    spread: Fraction,
    aside: frozenset[int] = frozenset(),
    least: Fraction = Fraction(0),
) -> list[Fraction]:
    """Return the share of neurons that each of some blocks of equal size loses: the less, the more it matters.

    `r_b = c - mean spread (I_b - mean I) / max |I - mean I|`, each held between `least` and MOST, with the c for which
    their mean is `mean` exactly. Blocks set `aside` (the first of a model stands out by far) do not count in the mean
    and the maximum of I, and are no further from `mean` than those that do.
    """
    exact = [Fraction(score) for score in importance]
    counted = [score for block, score in enumerate(exact) if block not in aside] or exact
    middle = sum(counted, Fraction(0)) / len(counted)
    furthest = max(abs(score - middle) for score in counted)
    if furthest == 0:
        return [mean] * len(exact)
    offsets = [-mean * spread * max(Fraction(-1), min(Fraction(1), (s - middle) / furthest)) for s in exact]
    return centred(offsets, [1] * len(exact), mean, min(least, mean), max(MOST, mean))


def with_unmet(num_own: int, num_unmet: int, width: int) -> int:
    """Return how many neurons a block is to lose, with those that blocks before it have kept against what was asked."""
    return max(num_own, min(num_own + num_unmet, floor(MOST * width)))
