"""Magnitude pruning: drop the smallest weights. The baseline that needs no calibration data."""

from collections.abc import Sequence
from typing import Literal

import torch

from pipeline.methods.step import LinearStep, LinearView, PrunedLinear, Shapes, Solver, largest, num_weights
from pipeline.sparsity import (
    SELECTION_BYTES,
    SemiStructured,
    Sparsity,
    keep_by_matrix,
    keep_by_row,
    map_rows,
    selection_bytes,
)
from pipeline.statistics import Gathered, Statistic


class Magnitude(LinearStep):
    """Score = |W|; weights compete within the whole matrix, or within their row."""

    scope: Literal["matrix", "row"] = "matrix"
    """Where weights compete. N:M patterns always compete within their group."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """None: it looks at weights alone."""
        return ()

    def rows_alone(self, sparsity: Sparsity) -> bool:
        """Weights compete within their row, or their group in it, unless the scope is the matrix."""
        return self.scope == "row" or isinstance(sparsity, SemiStructured)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Masks of a byte a weight, and the selection from a slab of rows, or from a whole matrix."""
        by_matrix = SELECTION_BYTES * largest(shapes)
        return num_weights(shapes) + (by_matrix if self.scope == "matrix" else selection_bytes(largest(shapes)))

    def solver(self, gathered: Gathered) -> Solver:
        """Return the function that prunes one linear."""

        def solve(view: LinearView) -> PrunedLinear:
            weight_OD, sparsity = view.dense_OD, view.sparsity
            if not self.rows_alone(sparsity):
                return PrunedLinear(keep_OD=keep_by_matrix(weight_OD.abs().float(), sparsity))
            keep = map_rows(lambda rows: keep_by_row(rows.abs().float(), sparsity), weight_OD, torch.bool)
            return PrunedLinear(keep_OD=keep)

        return solve
