"""A mix of N:M patterns: how many of every M weights each linear keeps, so that the block keeps N of M on average.

Every linear keeps 1 to M - 1 of a group, as N itself is: its own pattern is a pattern, in which later steps stay.

Shapes: T = totals that the linears so far may keep, N = numbers of kept weights a linear may choose from.
"""

from collections.abc import Sequence
from math import gcd

import torch

from pipeline.sparsity import SemiStructured

LEEWAY = 0.005
"""Fraction of the block's weights that may be dropped beyond the budget, for linears whose sizes do not balance."""


def nearest_mix(alphas: Sequence[float], sizes: Sequence[int], pattern: SemiStructured) -> list[int]:
    """Return how many weights of every group each linear keeps, 1 to M - 1: the mix nearest to what has been learnt.

    alphas: learnt fraction removed of each linear; sizes: its number of weights. Of all mixes that keep at most the
    budget of the pattern, and at least that less LEEWAY, the one with the least

        sum over linears of size * (kept / M - (1 - alpha))^2

    (the uniform one is always among them). Exact, by the least sum for every total that the first linears can keep;
    totals are multiples of the sizes' greatest common divisor, of which a block has some hundreds.
    """
    unit, group = gcd(*sizes), pattern.group
    weights = [size // unit for size in sizes]
    budget = pattern.keep * sum(weights)
    least_T = torch.full((budget + 1,), torch.inf, dtype=torch.float64)
    least_T[0] = 0
    choices = []
    for weight, alpha in zip(weights, alphas, strict=True):
        costs = [weight * (kept / group - (1 - alpha)) ** 2 for kept in range(1, group)]
        sums_NT = torch.stack([_after(least_T, weight * kept) + cost for kept, cost in enumerate(costs, start=1)])
        choice_T = sums_NT.argmin(dim=0)
        least_T = sums_NT.gather(0, choice_T[None])[0]
        choices.append(choice_T)
    first = budget - int(LEEWAY * group * sum(weights))
    total = budget - int(least_T[first:].flip(0).argmin())  # of equal sums the one nearest to the budget
    kept_by = []
    for weight, choice_T in zip(reversed(weights), reversed(choices), strict=True):
        kept_by.append(int(choice_T[total]) + 1)
        total -= weight * kept_by[-1]
    return kept_by[::-1]


def _after(least_T: torch.Tensor, added: int) -> torch.Tensor:
    """Return the sums by the totals that are reached when a linear adds its own."""
    moved_T = torch.full_like(least_T, torch.inf)
    moved_T[added:] = least_T[: max(0, len(least_T) - added)]
    return moved_T
