"""How large a feature of a linear's input is in each sequence, summed over sequences: what 2SSP judges neurons by."""

from typing import Self

import torch

from pipeline.numerics import all_finite
from pipeline.statistics import double_slabs


class SequenceNorms:
    """Sum over sequences of every input feature's norm over the tokens of one, `sum_s sqrt(sum_t x[s, t, j]^2)`.

    In float64, and with it the count of sequences, `count_1`: a tensor, so that replicas sum it with the rest;
    `num_tokens` stays that of the tokens seen here. Unlike other statistics it is told where a sequence ends: by every
    `update`.
    """

    def __init__(self, sums_D: torch.Tensor, count_1: torch.Tensor, num_tokens: int) -> None:
        self.sums_D, self.count_1 = sums_D, count_1
        self.num_tokens = num_tokens

    @property
    def mean_D(self) -> torch.Tensor:
        """Return the mean norm over all sequences, float64."""
        return self.sums_D / self.count_1

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> Self:
        """Return the statistic of no sequences."""
        sums_D, count_1 = (torch.zeros(size, dtype=torch.float64, device=device) for size in (num_features, 1))
        return cls(sums_D, count_1, 0)

    @classmethod
    def bytes_of(cls, num_features: int) -> int:
        """Return 8 bytes a feature, and the count's 8."""
        return 8 * num_features + 8

    def update(self, x_TD: torch.Tensor) -> None:
        """Add the tokens of one sequence, all of them, in float64, a slab of tokens at a time."""
        squares_D = torch.zeros_like(self.sums_D)
        for slab_TD in double_slabs(x_TD):
            squares_D += slab_TD.square().sum(dim=0)
        self.sums_D += squares_D.sqrt()
        self.count_1 += 1
        self.num_tokens += x_TD.shape[0]

    def merge(self, other: Self) -> None:
        """Add the sequences another statistic has seen."""
        self.sums_D += other.sums_D
        self.count_1 += other.count_1
        self.num_tokens += other.num_tokens

    def narrowed(self, features: torch.Tensor) -> Self:
        """Return the statistic of some of the features, by their numbers."""
        return type(self)(self.sums_D[features], self.count_1.clone(), self.num_tokens)

    def sums(self) -> list[torch.Tensor]:
        """Return the sums of norms and the count."""
        return [self.sums_D, self.count_1]

    def is_finite(self) -> bool:
        """Tell whether every sum is finite."""
        return all_finite(self.sums_D)
