"""How much sparsity each block gets: the same for all, or (OWL) the less, the more outliers the block has.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity"
(2310.05175). With D_b the share of a block's weights whose scores are outliers, and a spread of lambda, its sparsity
is `S_b = c - 2 lambda (D_b - min D) / (max D - min D)`. Unlike in the released code, c is chosen so that the mean of
all S_b, weighted by the number of their weights and after each is held between its bounds, is the asked sparsity.

Everything is worked out in fractions, so that the same outliers give the same allocation everywhere.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from pipeline.sparsity import SemiStructured, Sparsity, Unstructured, parse_sparsity

LEAST, MOST = Fraction(1, 100), Fraction(99, 100)
"""The smallest and the largest part of its weights that a block may lose, where what is asked of all lies between."""

STEPS = 10**6
"""The sparsity of a block is a whole number of millionths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """What a survey has found of one block."""

    num_outliers: int
    num_weights: int
    """Prunable weights."""

    num_gone: int = 0
    """Of these, weights that are taken out of the block before others are masked."""

    @property
    def size(self) -> int:
        """Weights that the block's sparsity is of."""
        return self.num_weights - self.num_gone

    @property
    def percentage(self) -> Fraction:
        """D_b: how many of a hundred weights are outliers."""
        return Fraction(100 * self.num_outliers, self.num_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The sparsity of every block: the one that is asked of the model, but where a block has one of its own."""

    target: Sparsity
    own: Mapping[int, Sparsity] = field(default_factory=dict)
    """By the block's number."""

    def of(self, index: int) -> Sparsity:
        """Return the sparsity of a block."""
        return self.own.get(index, self.target)

    def as_data(self, num_blocks: int) -> list[str]:
        """Return the sparsity of every block as text, for the ledger."""
        return [str(self.of(index)) for index in range(num_blocks)]

    @classmethod
    def from_data(cls, target: Sparsity, sparsities: Sequence[str]) -> "Allocation":
        """Return what `as_data` has written down."""
        own = {block: parse_sparsity(text) for block, text in enumerate(sparsities) if text != str(target)}
        return cls(target=target, own=own)


def by_outliers(target: Sparsity, found: Sequence[Outliers], spread: float) -> Allocation:
    """Return OWL's allocation; uniform where all blocks have the same share of outliers, or the target is a bound.

    No block is more than a millionth (of a group: one weight) away from its exact sparsity. The kept weights of N:M
    patterns, and the pruned ones of fractions, are as many as fit into what is asked of the whole: where all blocks
    are of one size, exactly as many. What a method makes of a block's fraction is rounded by the method: where every
    row loses the same, down to whole weights of a row.
    """
    if _is_uniform(target, found):
        return Allocation(target=target)
    exact, sizes = exact_sparsities(target, found, spread), [block.size for block in found]
    chosen: list[Sparsity]
    if isinstance(target, SemiStructured):
        kept = rounded([target.group * (1 - sparsity) for sparsity in exact], sizes)
        chosen = [SemiStructured(keep=number, group=target.group) for number in kept]
    else:
        chosen = [Unstructured(ratio=number / STEPS) for number in rounded([STEPS * s for s in exact], sizes)]
    return Allocation(target=target, own={block: own for block, own in enumerate(chosen) if own != target})


def bounds_of(target: Sparsity) -> tuple[Fraction, Fraction]:
    """Return the least and the most that a block may lose: of every N:M group a weight is kept, and one lost."""
    if isinstance(target, SemiStructured):
        return Fraction(1, target.group), 1 - Fraction(1, target.group)
    return min(LEAST, target.fraction), max(MOST, target.fraction)


def exact_sparsities(target: Sparsity, found: Sequence[Outliers], spread: float) -> list[Fraction]:
    """Return S_b of every block before it is rounded; their mean, weighted by size, is the target exactly."""
    if _alike(found):
        return [target.fraction] * len(found)
    percentages = [block.percentage for block in found]
    least, most = min(percentages), max(percentages)
    spared = [2 * Fraction(repr(spread)) * (percentage - least) / (most - least) for percentage in percentages]
    sizes = [block.size for block in found]
    return centred([-part for part in spared], sizes, target.fraction, *bounds_of(target))


def centred(
    offsets: Sequence[Fraction], sizes: Sequence[int], mean: Fraction, low: Fraction, high: Fraction
) -> list[Fraction]:
    """Return `min(max(c + offset, low), high)` with the c for which their mean, weighted by size, is `mean`.

    As c grows, the mean rises from `low` to `high`, in straight lines between the points where a value meets a bound.
    """

    def values(c: Fraction) -> list[Fraction]:
        return [min(max(c + offset, low), high) for offset in offsets]

    def mean_at(c: Fraction) -> Fraction:
        return sum((size * value for size, value in zip(sizes, values(c), strict=True)), Fraction(0)) / sum(sizes)

    assert low <= mean <= high, f"a mean of {mean} lies beyond {low} and {high}"
    bends = sorted({bound - offset for bound in (low, high) for offset in offsets})
    last = bisect_right(bends, mean, key=mean_at) - 1
    left = bends[last]
    if mean_at(left) == mean:
        return values(left)
    right = bends[last + 1]
    return values(left + (right - left) * (mean - mean_at(left)) / (mean_at(right) - mean_at(left)))


def rounded(wanted: Sequence[Fraction], sizes: Sequence[int]) -> list[int]:
    """Return whole numbers, each less than 1 from the wanted one, whose sum weighted by size does not exceed theirs.

    All are rounded down; then, in the order of what that took from them, each is rounded up if it fits. Where all
    sizes are equal, the sum is the largest there is. Ties go to the earlier one.
    """
    whole = [floor(number) for number in wanted]
    rests = [number - below for number, below in zip(wanted, whole, strict=True)]
    left = sum((size * rest for size, rest in zip(sizes, rests, strict=True)), Fraction(0))
    for index in sorted(range(len(wanted)), key=lambda i: -rests[i]):
        if rests[index] > 0 and sizes[index] <= left:
            whole[index] += 1
            left -= sizes[index]
    return whole


def held_at_bounds(target: Sparsity, found: Sequence[Outliers], spread: float) -> list[int]:
    """Return the blocks that a bound keeps from what their outliers would give them, or that just reach it."""
    if _is_uniform(target, found):
        return []
    bounds = bounds_of(target)
    return [b for b, sparsity in enumerate(exact_sparsities(target, found, spread)) if sparsity in bounds]


def _is_uniform(target: Sparsity, found: Sequence[Outliers]) -> bool:
    return _alike(found) or target.fraction in bounds_of(target)


def _alike(found: Sequence[Outliers]) -> bool:
    return all(block.percentage == found[0].percentage for block in found)
