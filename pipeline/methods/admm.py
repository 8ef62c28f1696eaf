"""ADMM: find the mask and the weights together, pruning little by little.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models" (2401.02938). Features are scaled to unit
power, so a scaled weight's size is its Wanda score. Each step of the alternating direction method of multipliers
lets the weights move towards the dense outputs, and towards the sparse copy of them that the mask leaves; the mask
is chosen anew each time, of the smallest scaled weights, and grows by a cubic schedule to what was asked. Then the
mask stays, and conjugate gradients bring the kept weights to their least-squares fit. A mask of an earlier step is
kept, and only that fit is done, starting from that step's weights; what it aims at are always the dense outputs.

Departures from the released code: the mask grows gradually in every mode (there only per row and for N:M), N:M is any
N:M (there 4:8 gives 2:4), and surviving weights of features that were never active stay as they were.

For R rows of D features, in float32: 4/3 D^3 operations for the inverse (once an input), and 2 R D^2 for each of
`choosing + refining` products. In memory, beside the Gram matrix: two matrices of its size while it is factorised, one
from then on, and WEIGHT_BYTES for each weight of a slab of rows (of the whole linear, where the scope is the matrix).
"""

from collections.abc import Sequence
from functools import cache
from math import inf

import torch
from pydantic import Field

from pipeline.methods.least_squares import WEIGHT_BYTES, FittingStep, LeastSquares, fit, split_step
from pipeline.methods.step import LinearView, PrunedLinear, Shapes, Solver
from pipeline.sparsity import SELECTION_BYTES, SemiStructured, Sparsity, keep_highest, keep_highest_in_groups
from pipeline.statistics import Gathered, Gram

RHO = 1.0
"""How strongly ADMM pulls the weights to their sparse copy, relative to each feature's power (the paper's 1)."""

FITTED_NUMEL = 1 << 25
"""Weights solved at once where rows are alone: 128 MB of float32, and few enough slabs to keep a device busy."""


class Admm(FittingStep):
    """Prune and fit in turns, then fit."""

    choosing: int = Field(default=15, ge=1)
    """Steps of ADMM, each pruning more than the one before; the last chooses the final mask."""

    @property
    def num_products(self) -> int:
        """Products of each linear with a matrix of its input, where it chooses the mask."""
        return self.choosing + self.refining + 1

    def num_inverses(self, num_linears: int) -> int:
        """Return how many matrices are inverted for the linears of one input."""
        return 1

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Two matrices while an input is factorised, then the inverse, and a slab of one linear's rows.

        Results gather all the while: a mask and a new weight of every linear.
        """
        results = peak = 0
        for group in groups:
            columns = shapes[group[0]][1]
            inverse = Gram.bytes_of(columns)
            peak = max(peak, results + 2 * inverse)
            for rows, _ in (shapes[name] for name in group):
                results += rows * columns * (1 + dtype.itemsize)
                at_once = columns * min(rows, self._rows_at_once(columns) or rows)
                peak = max(peak, results + inverse + max(WEIGHT_BYTES, SELECTION_BYTES + 8) * at_once)
        return peak

    def solver(self, gathered: Gathered) -> Solver:
        """Damp and invert what all linears of one input share; the result prunes each of them."""
        problem = LeastSquares.of(gathered.of(Gram).gram_DD, self.damping)
        inverse = cache(lambda: problem.inverse(RHO))

        def solve(view: LinearView) -> PrunedLinear:
            def choose(dense_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return self._choose(dense_RD, inverse(), view.sparsity)

            return fit(view, problem, choose, self.refining, self._rows_at_once(view.dense_OD.shape[1]))

        return solve

    def _rows_at_once(self, num_columns: int) -> int | None:
        """Return how many rows are solved together; None for all."""
        return None if self.scope == "matrix" else max(1, FITTED_NUMEL // num_columns)

    def _choose(
        self, dense_RD: torch.Tensor, inverse_DD: torch.Tensor, sparsity: Sparsity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a mask that has grown step by step, and the weights that have adapted to it."""
        state_RD = dense_RD.clone()
        for step in range(1, self.choosing + 1):
            share = 1 - (1 - step / self.choosing) ** 3
            keep_RD = grown_mask(state_RD.abs(), sparsity, share, self.scope)
            split_step(state_RD, keep_RD, dense_RD, inverse_DD, RHO)
        return keep_RD, state_RD


def grown_mask(score_RD: torch.Tensor, sparsity: Sparsity, share: float, scope: str) -> torch.Tensor:
    """Return keep_RD that drops the lowest scores, a share of as many as the sparsity asks for.

    N:M: the highest of each group are safe from the start, and only the others compete. Changes the scores.
    """
    if isinstance(sparsity, SemiStructured):
        score_RD.masked_fill_(keep_highest_in_groups(score_RD, sparsity), inf)
    pool = score_RD.reshape(1, -1) if scope == "matrix" else score_RD
    return keep_highest(pool, int(share * sparsity.num_pruned(pool.shape[1]))).view_as(score_RD)
