"""Magnitude pruning: drop the smallest weights. The baseline that needs no calibration data."""

from typing import ClassVar, Literal

import torch

from pipeline.methods.step import LinearStep, PrunedLinear, Solver
from pipeline.sparsity import SemiStructured, Sparsity, keep_by_matrix, keep_by_row
from pipeline.statistics import Statistic


class Magnitude(LinearStep):
    """Score = |W|; weights compete within the whole matrix, or within their row."""

    statistic: ClassVar[type[Statistic] | None] = None

    scope: Literal["matrix", "row"] = "matrix"
    """Where weights compete. N:M patterns always compete within their group."""

    def rows_alone(self, sparsity: Sparsity) -> bool:
        """Weights compete within their row, or their group in it, unless the scope is the matrix."""
        return self.scope == "row" or isinstance(sparsity, SemiStructured)

    def solver(self, statistic: Statistic | None) -> Solver:
        """Return the function that prunes one linear."""
        select = keep_by_matrix if self.scope == "matrix" else keep_by_row

        def solve(weight_OD: torch.Tensor, keep_OD: torch.Tensor | None, sparsity: Sparsity) -> PrunedLinear:
            assert keep_OD is None
            return PrunedLinear(keep_OD=select(weight_OD.abs().float(), sparsity))

        return solve
