"""How much to prune and in what pattern, and keep masks with exactly that many zeros.

A keep mask is boolean, True = kept. Masks are made by choosing *indices* in a stable order (lowest score first,
ties by position), never by comparing with a threshold, so a mask always has exactly the number of zeros asked for.

Shapes: O = out features (rows), D = in features (columns), N = any number of entries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch

SLAB_NUMEL = 1 << 23
"""Scores ranked at once: bounds the temporaries of a selection to some 100 MB, whatever the matrix."""

SELECTION_BYTES = 20
"""Bytes a score takes while it is ranked: itself, a copy, a position of 8 bytes, and the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstructured:
    """Drop a fraction of the weights, wherever they are."""

    ratio: float
    """Fraction removed, 0 <= ratio < 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"sparsity is {self.ratio}; the fraction removed must be at least 0 and below 1")

    @property
    def fraction(self) -> Fraction:
        """Fraction removed, exactly as it was written: 0.29 is 29/100."""
        return Fraction(repr(self.ratio))

    def num_pruned(self, numel: int) -> int:
        """Return floor(ratio x numel), exactly: 0.29 of 100 is 29, though 0.29 * 100 is 28.999… in floats."""
        return floor(self.fraction * numel)

    def __str__(self) -> str:
        return f"{self.ratio:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SemiStructured:
    """Keep `keep` of every `group` consecutive input features of a row (2:4 keeps two of four)."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.group:
            raise ValueError(
                f"pattern {self.keep}:{self.group} keeps {self.keep} of {self.group}; "
                "the number kept must be at least 1 and below the group size"
            )

    @property
    def ratio(self) -> float:
        """Fraction removed."""
        return 1 - self.keep / self.group

    @property
    def fraction(self) -> Fraction:
        """Fraction removed, exactly."""
        return Fraction(self.group - self.keep, self.group)

    def num_pruned(self, numel: int) -> int:
        """Return how many of `numel` weights are removed; `numel` is a multiple of the group."""
        return numel // self.group * (self.group - self.keep)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


Sparsity = Unstructured | SemiStructured


def parse_sparsity(value: float | str) -> Sparsity:
    """Read `0.5`, `"0.5"` or `"2:4"`; raises ValueError that says what is wrong."""
    if isinstance(value, str) and ":" in value:
        keep, _, group = value.partition(":")
        if not (keep.strip().isdecimal() and group.strip().isdecimal()):
            raise ValueError(f"pattern {value!r} is not KEPT:GROUP, two whole numbers such as 2:4")
        return SemiStructured(keep=int(keep), group=int(group))
    try:
        return Unstructured(ratio=float(value))
    except ValueError as error:
        if "fraction removed" in str(error):
            raise
        raise ValueError(f"sparsity {value!r} is neither a fraction such as 0.5 nor a pattern such as 2:4") from None


def divides(pattern: Sparsity, num_columns: int) -> bool:
    """Tell whether the pattern fits rows of `num_columns` input features."""
    return isinstance(pattern, Unstructured) or num_columns % pattern.group == 0


def row_slabs(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Split the rows of a matrix into slabs of at most SLAB_NUMEL entries, or of one row where that is longer."""
    rows_per_slab = max(1, SLAB_NUMEL // num_columns)
    for start in range(0, num_rows, rows_per_slab):
        yield slice(start, min(start + rows_per_slab, num_rows))


def in_slab(numel: int) -> int:
    """Return how many entries the largest slab has of a matrix with so many (of rows that are no longer)."""
    return min(numel, SLAB_NUMEL)


def selection_bytes(num_scores: int) -> int:
    """Return the temporaries of choosing or ranking by row among that many scores (their float32 included)."""
    return SELECTION_BYTES * in_slab(num_scores)


def kept_in_rows(keep_RN: torch.Tensor) -> torch.Tensor:
    """Return how many entries each row keeps, int64 [R]; counting a whole mask at once would take 9 bytes an entry."""
    return torch.cat([keep_RN[rows].count_nonzero(dim=1) for rows in row_slabs(*keep_RN.shape)])


def map_rows(
    function: Callable[[torch.Tensor], torch.Tensor], matrix_RN: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Apply a function of rows to slabs of rows, so that its temporaries stay bounded; returns [R, N] of `dtype`."""
    result_RN = torch.empty(matrix_RN.shape, dtype=dtype, device=matrix_RN.device)
    for rows in row_slabs(*matrix_RN.shape):
        result_RN[rows] = function(matrix_RN[rows])
    return result_RN


def keep_highest(score_RN: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """Return keep_RN that drops, in every row, the `num_pruned` lowest scores; ties drop the earlier column.

    Equal to dropping the first `num_pruned` of a stable ascending sort, without sorting: the order statistic is
    found by selection, and only rows in which it is tied are looked at again. Scores are finite floats.
    """
    if num_pruned == 0:
        return torch.ones_like(score_RN, dtype=torch.bool)
    return map_rows(lambda rows_RN: _keep_highest_slab(rows_RN, num_pruned), score_RN, torch.bool)


def _keep_highest_slab(score_RN: torch.Tensor, num_pruned: int) -> torch.Tensor:
    kth_R1 = score_RN.kthvalue(num_pruned, dim=1, keepdim=True).values
    keep_RN = score_RN > kth_R1
    num_kept = score_RN.shape[1] - num_pruned
    tied_R = (keep_RN.count_nonzero(dim=1) != num_kept).nonzero().flatten()
    if len(tied_R):
        tied = score_RN[tied_R]
        equal = tied == kth_R1[tied_R]
        surplus = num_pruned - (tied < kth_R1[tied_R]).sum(dim=1, keepdim=True, dtype=torch.int32)
        keep_RN[tied_R] |= equal & (equal.cumsum(dim=1, dtype=torch.int32) > surplus)
    return keep_RN


def keep_highest_in_groups(score_OD: torch.Tensor, pattern: SemiStructured) -> torch.Tensor:
    """Return keep_OD that keeps the `pattern.keep` highest of every group; ties drop the earlier column."""
    num_rows, num_columns = score_OD.shape
    keep = keep_highest(score_OD.reshape(-1, pattern.group), pattern.group - pattern.keep)
    return keep.view(num_rows, num_columns)


def keep_by_row(score_OD: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Return keep_OD with the same number of zeros in every row, or in every group of every row."""
    if isinstance(sparsity, SemiStructured):
        return keep_highest_in_groups(score_OD, sparsity)
    return keep_highest(score_OD, sparsity.num_pruned(score_OD.shape[1]))


def keep_by_matrix(score_OD: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Return keep_OD with the asked number of zeros anywhere in the matrix (patterns stay within groups)."""
    if isinstance(sparsity, SemiStructured):
        return keep_highest_in_groups(score_OD, sparsity)
    return keep_highest(score_OD.reshape(1, -1), sparsity.num_pruned(score_OD.numel())).view_as(score_OD)


def rank_dtype(num_columns: int) -> torch.dtype:
    """Return the dtype of ranks within rows of this length: uint8 up to 255 entries, int16 up to 32767, else int32."""
    if num_columns <= torch.iinfo(torch.uint8).max:
        return torch.uint8
    return torch.int16 if num_columns <= torch.iinfo(torch.int16).max else torch.int32


def row_ranks(score_OD: torch.Tensor) -> torch.Tensor:
    """Return rank_OD: position of each weight in its row's stable ascending order of scores (see `rank_dtype`)."""
    dtype = rank_dtype(score_OD.shape[1])
    position_D = torch.arange(score_OD.shape[1], dtype=dtype, device=score_OD.device)

    def rank(rows_RD: torch.Tensor) -> torch.Tensor:
        order = rows_RD.argsort(dim=1, stable=True)
        return torch.empty_like(order, dtype=dtype).scatter_(1, order, position_D.expand_as(order))

    return map_rows(rank, score_OD, dtype)


def holds(keep_OD: torch.Tensor, pattern: SemiStructured) -> bool:
    """Tell whether every group keeps at most `pattern.keep` weights."""
    kept = keep_OD.reshape(-1, pattern.group).sum(dim=1)
    return bool((kept <= pattern.keep).all())
