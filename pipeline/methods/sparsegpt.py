"""SparseGPT: prune column by column and let the columns still to come absorb each error.

Frantar and Alistarh, "SparseGPT" (2301.00774), algorithm 1. Optimal-brain-surgeon steps with the order of
columns fixed: with H = X^T X and H^-1 = U^T U (U upper triangular), removing w_j costs (w_j / U_jj)^2 / 2, and
the best change of the later columns is -(w_j / U_jj) U_j,j+1: .

The mask of an unstructured solve is chosen per slab of 128 columns over all rows (as in the paper), the mask of
an N:M solve per row and group, each from weights that have already absorbed the earlier columns. A mask given by
an earlier step is kept and only the update is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from pipeline.methods.factorise import DAMPING_LIMIT, with_damping_enough
from pipeline.methods.step import LinearStep, LinearView, PrunedLinear, Shapes, Solver
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured, keep_highest
from pipeline.statistics import Gathered, Gram, Statistic

SWEPT_NUMEL = 1 << 26
"""Weights swept at once where rows are alone: 256 MB of float32, and few enough sweeps to keep a device busy."""

SLAB_BYTES = 24
"""Bytes a weight of a slab of columns takes: its cost and error, and the selection of its mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFactor:
    """Upper Cholesky factor of the inverse Hessian of one input."""

    upper_DD: torch.Tensor
    """U with H^-1 = U^T U, float32."""

    dead_D: torch.Tensor
    """bool, True where the input feature was always zero."""

    damping: float
    """Multiple of the mean diagonal that was added for the factorisation to succeed."""


def inverse_factor(gram_DD: torch.Tensor, damping: float) -> InverseFactor:
    """Factorise the inverse of a Gram matrix [D, D], multiplying the damping by 10 until it succeeds.

    Reversing the order of features turns the lower Cholesky factor of H into V with H = V V^T, V upper
    triangular, so that U = V^-1: one factorisation and one triangular inverse, and H^-1 is never formed. Beside
    the Gram matrix, which stays as it is, at most two matrices of its size are alive.
    Raises NumericsError when no damping up to DAMPING_LIMIT suffices.
    """
    diagonal_D = gram_DD.diagonal()
    dead_D = diagonal_D == 0
    mean = diagonal_D.mean().item() or 1.0
    upper_DD, used = with_damping_enough(
        lambda d: _factorise(gram_DD, d * mean + dead_D.float() * mean), damping, diagonal_D
    )
    return InverseFactor(upper_DD=upper_DD, dead_D=dead_D, damping=used)


def _factorise(gram_DD: torch.Tensor, added_D: torch.Tensor) -> torch.Tensor | None:
    """Return U for the Gram matrix with `added_D` on its diagonal; None where that is not positive definite."""
    hessian_DD = gram_DD.flip(0, 1)
    hessian_DD.diagonal().add_(added_D.flip(0))
    reversed_lower_DD, failed = torch.linalg.cholesky_ex(hessian_DD)
    del hessian_DD
    if failed:
        return None
    lower_DD = reversed_lower_DD.flip(0, 1)
    del reversed_lower_DD
    upper_DD = torch.eye(len(added_D), device=gram_DD.device).T  # by columns, so that it is solved where it is
    torch.linalg.solve_triangular(lower_DD, upper_DD, upper=True, out=upper_DD)
    return upper_DD


class SparseGPT(LinearStep):
    """Prune and compensate, column by column."""

    accepts_mask: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    damping: float = Field(default=0.01, gt=0, le=DAMPING_LIMIT)
    """Added to the Hessian's diagonal, as a multiple of its mean."""

    slab: int = Field(default=128, ge=1)
    """Columns whose unstructured mask is chosen together; the later columns are updated after each slab."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix: the Hessian of the output error, up to a factor."""
        return (Gram,)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Two matrices while an input is factorised, then the factor and one linear in float32, by columns.

        Results gather all the while: a mask and a new weight of every linear.
        """
        results = peak = 0
        for group in groups:
            factor = Gram.bytes_of(shapes[group[0]][1])
            peak = max(peak, results + 2 * factor)
            for rows, columns in (shapes[name] for name in group):
                results += rows * columns * (1 + dtype.itemsize)
                slab = SLAB_BYTES * rows * min(self.slab, columns)
                peak = max(peak, results + factor + 4 * rows * columns + slab)
        return peak

    def solver(self, gathered: Gathered) -> Solver:
        """Factorise the Hessian that all linears of one input share; the result prunes each of them."""
        factor = inverse_factor(gathered.of(Gram).gram_DD, self.damping)

        def solve(view: LinearView) -> PrunedLinear:
            weight, keep = sweep(view.weight_OD, factor, view.sparsity, view.keep_OD, self.slab)
            return PrunedLinear(weight_OD=weight, keep_OD=keep, notes={"damping": factor.damping})

        return solve


def sweep(
    weight_OD: torch.Tensor,
    factor: InverseFactor,
    sparsity: Sparsity,
    given_OD: torch.Tensor | None,
    slab_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune all columns from left to right; return the updated weight (its dtype kept) and keep_OD.

    Where no row's mask depends on another's (N:M, or a mask that is given), a slab of rows at a time. Dead input
    features are pruned first, and left untouched where they survive.
    """
    num_rows, num_columns = weight_OD.shape
    updated_OD = torch.empty_like(weight_OD, memory_format=torch.contiguous_format)
    keep_OD = updated_OD.new_empty(weight_OD.shape, dtype=torch.bool) if given_OD is None else given_OD.contiguous()
    rows_alone = given_OD is not None or isinstance(sparsity, SemiStructured)
    rows_at_once = max(1, SWEPT_NUMEL // num_columns) if rows_alone else num_rows
    for start in range(0, num_rows, rows_at_once):
        rows = slice(start, start + rows_at_once)
        pattern = None if given_OD is not None else sparsity
        _sweep_rows(weight_OD[rows], factor, pattern, slab_columns, updated_OD[rows], keep_OD[rows])
    return updated_OD, keep_OD


def _sweep_rows(
    weight_OD: torch.Tensor,
    factor: InverseFactor,
    sparsity: Sparsity | None,
    slab_columns: int,
    updated_OD: torch.Tensor,
    keep_OD: torch.Tensor,
) -> None:
    """Fill the updated weight and the keep mask of some rows; without a sparsity, the mask is given.

    Works on the transpose, where a column is contiguous.
    """
    num_rows, num_columns = weight_OD.shape
    pattern = sparsity if isinstance(sparsity, SemiStructured) else None
    if pattern is not None:
        slab_columns = max(1, slab_columns // pattern.group) * pattern.group
    weight_DO = weight_OD.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for start in range(0, num_columns, slab_columns):
        stop = min(start + slab_columns, num_columns)
        columns = slice(start, stop)
        keep_DO = torch.ones_like(weight_DO[columns], dtype=torch.bool)
        if sparsity is None:
            keep_DO.copy_(keep_OD[:, columns].T)
        elif isinstance(sparsity, Unstructured):
            num_pruned = sparsity.num_pruned(num_rows * stop) - sparsity.num_pruned(num_rows * start)
            scores_DO = removal_cost(weight_DO[columns], factor, columns)
            keep_DO = keep_highest(scores_DO.reshape(1, -1), num_pruned).view_as(scores_DO)
        errors_DO = _sweep_slab(weight_DO[columns], keep_DO, factor, columns, pattern)
        weight_DO[stop:].addmm_(factor.upper_DD[columns, stop:].T, errors_DO, alpha=-1)
        updated_OD[:, columns] = weight_DO[columns].masked_fill_(~keep_DO, 0).T
        if sparsity is not None:
            keep_OD[:, columns] = keep_DO.T


def removal_cost(weight_DO: torch.Tensor, factor: InverseFactor, columns: slice) -> torch.Tensor:
    """Return the squared output error of removing each weight, (w / U_jj)^2; 0 for dead input features."""
    scale_D = factor.upper_DD.diagonal()[columns].reciprocal().masked_fill(factor.dead_D[columns], 0)
    return (weight_DO * scale_D[:, None]).square_()


def _sweep_slab(
    weight_DO: torch.Tensor,
    keep_DO: torch.Tensor,
    factor: InverseFactor,
    columns: slice,
    pattern: SemiStructured | None,
) -> torch.Tensor:
    """Prune one slab of columns in place, choosing N:M masks on the way; return its scaled errors."""
    upper_DD = factor.upper_DD[columns, columns]
    errors_DO = torch.zeros_like(weight_DO)
    for j in range(len(weight_DO)):
        if pattern is not None and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            inputs = slice(columns.start + j, columns.start + j + pattern.group)
            scores_OG = removal_cost(weight_DO[group], factor, inputs).T.contiguous()
            keep_DO[group] = keep_highest(scores_OG, pattern.group - pattern.keep).T
        torch.mul(weight_DO[j], ~keep_DO[j] / upper_DD[j, j], out=errors_DO[j])
        weight_DO[j:].addcmul_(upper_DD[j, j:, None], errors_DO[j], value=-1)
    return errors_DO
