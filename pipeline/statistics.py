"""What a method needs to know of a linear's input, gathered batch by batch and mergeable.

Each statistic is `empty`, then `update`d with inputs x_TD (T tokens, D input features), and two of them over
different tokens `merge` into the statistic of all tokens: merge of parts equals the whole.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, Self, TypeVar

import torch

from pipeline.numerics import all_finite

CPU_SLAB_NUMEL, SLAB_NUMEL = 1 << 17, 1 << 24
"""Inputs squared at once: what stays in a core's cache, or keeps an accelerator busy with 128 MB of float64."""


class Statistic(Protocol):
    """A mergeable summary of a linear's inputs."""

    num_tokens: int

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> Self:
        """Return the statistic of no tokens."""

    @classmethod
    def bytes_of(cls, num_features: int) -> int:
        """Return what the statistic of that many features takes."""

    def update(self, x_TD: torch.Tensor) -> None:
        """Add the tokens of one batch."""

    def merge(self, other: Self) -> None:
        """Add the tokens another statistic has seen."""

    def narrowed(self, features: torch.Tensor) -> Self:
        """Return the statistic of some of the features, by their numbers."""

    def sums(self) -> list[torch.Tensor]:
        """Return the tensors that add up over tokens, for whoever sums them over replicas."""

    def is_finite(self) -> bool:
        """Tell whether every number in it is finite."""


AnyStatistic = TypeVar("AnyStatistic", bound=Statistic)


class Gathered:
    """The statistics of one input, by kind; several linears may share it."""

    def __init__(self, statistics: Iterable[Statistic] = ()) -> None:
        self._by_kind: dict[type[Statistic], Statistic] = {type(statistic): statistic for statistic in statistics}

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._by_kind.values())

    def of(self, kind: type[AnyStatistic]) -> AnyStatistic:
        """Return the statistic of that kind, which has been gathered."""
        statistic = self._by_kind[kind]
        assert isinstance(statistic, kind)
        return statistic

    def holding(self, kinds: Iterable[type[Statistic]]) -> "Gathered":
        """Return only these kinds, so that what is dropped here lives no longer than who uses them."""
        return Gathered(self._by_kind[kind] for kind in kinds)

    def take(self, other: "Gathered") -> None:
        """Add the statistics that another one holds."""
        self._by_kind.update(other._by_kind)

    def narrow(self, features: torch.Tensor) -> None:
        """Forget all features but these (their numbers), one statistic after the other."""
        for kind, statistic in self._by_kind.items():
            self._by_kind[kind] = statistic.narrowed(features)

    def drop(self, kind: type[Statistic]) -> None:
        """Let go of a statistic."""
        del self._by_kind[kind]


def double_slabs(x_TD: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tokens in float64, a slab at a time."""
    slab_numel = CPU_SLAB_NUMEL if x_TD.device.type == "cpu" else SLAB_NUMEL
    for slab_TD in torch.split(x_TD, max(1, slab_numel // x_TD.shape[1])):
        yield slab_TD.double()


class ColumnSquares:
    """Sum of squares of every input feature: `squares_D[j] = sum_t x[t, j]^2`, in float64.

    Wanda divides by the number of sequences; a constant factor never changes a ranking, so the plain sum is kept.
    """

    def __init__(self, squares_D: torch.Tensor, num_tokens: int) -> None:
        self.squares_D = squares_D
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> Self:
        """Return the statistic of no tokens."""
        return cls(torch.zeros(num_features, dtype=torch.float64, device=device), 0)

    @classmethod
    def bytes_of(cls, num_features: int) -> int:
        """Return 8 bytes a feature."""
        return 8 * num_features

    def update(self, x_TD: torch.Tensor) -> None:
        """Add the tokens of one batch, in float64, a slab of tokens at a time."""
        for slab_TD in double_slabs(x_TD):
            self.squares_D += slab_TD.square().sum(dim=0)
        self.num_tokens += x_TD.shape[0]

    def merge(self, other: Self) -> None:
        """Add the tokens another statistic has seen."""
        self.squares_D += other.squares_D
        self.num_tokens += other.num_tokens

    def narrowed(self, features: torch.Tensor) -> Self:
        """Return the statistic of some of the features, by their numbers."""
        return type(self)(self.squares_D[features], self.num_tokens)

    def sums(self) -> list[torch.Tensor]:
        """Return the sums of squares."""
        return [self.squares_D]

    def is_finite(self) -> bool:
        """Tell whether every sum is finite."""
        return all_finite(self.squares_D)


class Moments:
    """Sum, and sum of squares, of every input feature, and the count of tokens, in float64.

    The count is a tensor, `count_1`, so that replicas sum it with the rest; `num_tokens` stays that of the tokens seen
    here.
    """

    def __init__(self, sums_D: torch.Tensor, squares_D: torch.Tensor, count_1: torch.Tensor, num_tokens: int) -> None:
        self.sums_D, self.squares_D, self.count_1 = sums_D, squares_D, count_1
        self.num_tokens = num_tokens

    @property
    def mean_D(self) -> torch.Tensor:
        """Return the mean over all tokens, float64."""
        return self.sums_D / self.count_1

    @property
    def mean_squares_D(self) -> torch.Tensor:
        """Return the mean of squares over all tokens, float64."""
        return self.squares_D / self.count_1

    @property
    def variance_D(self) -> torch.Tensor:
        """Return the (population) variance over all tokens, float64; rounding leaves it at 1e-16 of the mean square."""
        return (self.mean_squares_D - self.mean_D.square()).clamp_(min=0)

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> Self:
        """Return the statistic of no tokens."""
        sums_D, squares_D, count_1 = (
            torch.zeros(size, dtype=torch.float64, device=device) for size in (num_features, num_features, 1)
        )
        return cls(sums_D, squares_D, count_1, 0)

    @classmethod
    def bytes_of(cls, num_features: int) -> int:
        """Return 16 bytes a feature, and the count's 8."""
        return 16 * num_features + 8

    def update(self, x_TD: torch.Tensor) -> None:
        """Add the tokens of one batch, in float64, a slab of tokens at a time."""
        for slab_TD in double_slabs(x_TD):
            self.sums_D += slab_TD.sum(dim=0)
            self.squares_D += slab_TD.square().sum(dim=0)
        self.count_1 += x_TD.shape[0]
        self.num_tokens += x_TD.shape[0]

    def merge(self, other: Self) -> None:
        """Add the tokens another statistic has seen."""
        for mine, theirs in zip(self.sums(), other.sums(), strict=True):
            mine += theirs
        self.num_tokens += other.num_tokens

    def narrowed(self, features: torch.Tensor) -> Self:
        """Return the statistic of some of the features, by their numbers."""
        return type(self)(self.sums_D[features], self.squares_D[features], self.count_1.clone(), self.num_tokens)

    def sums(self) -> list[torch.Tensor]:
        """Return the sums, the sums of squares and the count."""
        return [self.sums_D, self.squares_D, self.count_1]

    def is_finite(self) -> bool:
        """Tell whether every sum is finite (a NaN or Inf input always reaches the squares)."""
        return all_finite(self.squares_D)


class Gram:
    """Inner products of all pairs of input features: `gram_DD = sum_t x_t x_t^T`, in float32.

    SparseGPT's Hessian is this times 2/N; the method is homogeneous in it, so the plain sum is kept.
    """

    def __init__(self, gram_DD: torch.Tensor, num_tokens: int) -> None:
        self.gram_DD = gram_DD
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> Self:
        """Return the statistic of no tokens."""
        return cls(torch.zeros(num_features, num_features, dtype=torch.float32, device=device), 0)

    @classmethod
    def bytes_of(cls, num_features: int) -> int:
        """Return 4 bytes a pair of features."""
        return 4 * num_features**2

    def update(self, x_TD: torch.Tensor) -> None:
        """Add the tokens of one batch, in float32."""
        x_TD = x_TD.float()
        self.gram_DD.addmm_(x_TD.T, x_TD)
        self.num_tokens += x_TD.shape[0]

    def merge(self, other: Self) -> None:
        """Add the tokens another statistic has seen."""
        self.gram_DD += other.gram_DD
        self.num_tokens += other.num_tokens

    def narrowed(self, features: torch.Tensor) -> Self:
        """Return the statistic of some of the features, by their numbers."""
        return type(self)(self.gram_DD[features[:, None], features], self.num_tokens)

    def sums(self) -> list[torch.Tensor]:
        """Return the inner products."""
        return [self.gram_DD]

    def is_finite(self) -> bool:
        """Tell whether every product is finite (a NaN or Inf input always reaches the diagonal)."""
        return all_finite(self.gram_DD.diagonal())


def relative_error(output_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """Return the mean over channels of |Y - Y_ref|^2 / |Y_ref|^2, float32; channels that are zero count as 0.

    BESA's reconstruction error (released code, `l2_loss`); differentiable in the output.
    """
    difference_D = (output_BTD.float() - target_BTD.float()).square().sum(dim=(0, 1))
    power_D = target_BTD.float().square().sum(dim=(0, 1))
    return (difference_D / power_D.masked_fill(power_D == 0, torch.inf)).mean()
