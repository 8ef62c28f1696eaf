"""Wanda: drop the weights that matter least to their own output, judged by weight times input norm.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2306.11695), equation 1:
`S_ij = |W_ij| * ||X_j||_2`. Weights compete within their row (per output), or within their N:M group; the kept
ones stay as they are.
"""

from collections.abc import Sequence

import torch

from pipeline.methods.step import LinearStep, LinearView, PrunedLinear, Shapes, Solver, largest, num_weights
from pipeline.sparsity import Sparsity, keep_by_row, map_rows, selection_bytes
from pipeline.statistics import ColumnSquares, Gathered, Statistic


def input_norms(squares: ColumnSquares) -> torch.Tensor:
    """Return ||X_j||_2 of every input feature, float32 [D]."""
    return squares.squares_D.sqrt().float()


def wanda_scores(weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
    """Return |W_ij| * ||X_j||, float32 [O, D]."""
    return weight_OD.abs().float().mul_(norm_D)


class Wanda(LinearStep):
    """Score = |W| * input norm; weights compete within their row."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Column squares: the input norms."""
        return (ColumnSquares,)

    def rows_alone(self, sparsity: Sparsity) -> bool:
        """Weights compete within their row only."""
        return True

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Masks of a byte a weight, and the selection from a slab of rows."""
        return num_weights(shapes) + selection_bytes(largest(shapes))

    def solver(self, gathered: Gathered) -> Solver:
        """Return the function that prunes one linear; input norms are shared by all linears of one input."""
        norm_D = input_norms(gathered.of(ColumnSquares))

        def solve(view: LinearView) -> PrunedLinear:
            def choose(rows: torch.Tensor) -> torch.Tensor:
                return keep_by_row(wanda_scores(rows, norm_D), view.sparsity)

            keep = map_rows(choose, view.dense_OD, torch.bool)
            return PrunedLinear(keep_OD=keep)

        return solve
