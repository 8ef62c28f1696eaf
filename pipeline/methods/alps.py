"""ALPS: find the mask by ADMM that grows ever stricter until the mask stands still, then fit the kept weights.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (2406.07831),
algorithms 1 and 2. Features are scaled to unit power. The sparse copy of the weights always has the full sparsity;
the penalty rho that ties weights and copy together starts low, so that the mask may wander, and is raised every
third step, the more the more of the mask has changed. When nothing changes any more, conjugate gradients fit the
kept weights. A mask of an earlier step is kept, and only that fit is done, from that step's weights.

Departures: weights compete within their row by default (there within the matrix); the ridge is relative to each
feature's power (there to the mean); (H + rho I)^-1 is factorised anew for every rho (there rebuilt from one
eigendecomposition in float64, which takes twice as many operations each time and twice the memory).

For R rows of D features, in float32: 2 R D^2 operations for each of the steps (USUAL_STEPS until the mask stands
still, at most `limit`, then `refining`), and 4/3 D^3 for every third one. In memory, beside the Gram matrix: two
matrices of its size, and WEIGHT_BYTES for each weight of a linear.
"""

from collections.abc import Sequence

import torch
from pydantic import Field

from pipeline.methods.least_squares import WEIGHT_BYTES, FittingStep, LeastSquares, fit, split_step
from pipeline.methods.step import LinearView, PrunedLinear, Shapes, Solver
from pipeline.sparsity import SELECTION_BYTES, Sparsity, keep_by_matrix, keep_by_row
from pipeline.statistics import Gathered, Gram

FIRST_RHO = 0.1
"""Penalty to begin with, relative to each feature's power."""

STEPS_PER_RHO = 3

USUAL_STEPS = 40
"""After about as many the mask of a real linear stands still, at 50%, 70% and 2:4 alike."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""How rho grows where more than this share of the kept weights has changed since it last grew."""


class Alps(FittingStep):
    """Prune under a rising penalty, then fit."""

    limit: int = Field(default=300, ge=1)
    """Steps of ADMM at most."""

    @property
    def num_products(self) -> int:
        """Products of each linear with a matrix of its input, where it chooses the mask and settles as usual."""
        return min(self.limit, USUAL_STEPS) + self.refining + 1

    def num_inverses(self, num_linears: int) -> int:
        """Return how many matrices are inverted for the linears of one input, as a rule."""
        return num_linears * (1 + min(self.limit, USUAL_STEPS) // STEPS_PER_RHO)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """A matrix and its factor or inverse, and one linear, beside the masks and new weights of those before."""
        results = peak = 0
        for rows, columns in (shapes[name] for group in groups for name in group):
            results += rows * columns * (1 + dtype.itemsize)
            linear = max(WEIGHT_BYTES, SELECTION_BYTES + 10) * rows * columns
            peak = max(peak, results + 2 * Gram.bytes_of(columns) + linear)
        return peak

    def solver(self, gathered: Gathered) -> Solver:
        """Damp what all linears of one input share; the result prunes each of them."""
        problem = LeastSquares.of(gathered.of(Gram).gram_DD, self.damping)

        def solve(view: LinearView) -> PrunedLinear:
            return fit(view, problem, lambda dense_OD: self._choose(dense_OD, problem, view.sparsity), self.refining)

        return solve

    def _choose(
        self, dense_OD: torch.Tensor, problem: LeastSquares, sparsity: Sparsity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mask that the rising penalty settles on, and the weights that have adapted to it."""
        select = keep_by_row if self.scope == "row" else keep_by_matrix
        keep_OD = before_OD = select(dense_OD.abs(), sparsity)
        state_OD, rho = dense_OD * keep_OD, FIRST_RHO
        inverse_DD = problem.inverse(rho)
        for step in range(1, self.limit + 1):
            split_step(state_OD, keep_OD, dense_OD, inverse_DD, rho)
            keep_OD = select(state_OD.abs(), sparsity)
            if step % STEPS_PER_RHO == 0:
                changed = (keep_OD ^ before_OD).count_nonzero().item() / max(1, keep_OD.count_nonzero().item())
                if changed == 0:
                    break
                growth = next(factor for share, factor in GROWTH if changed > share)
                state_OD = torch.where(keep_OD, state_OD, state_OD / growth)  # the multiplier is rho times this
                rho, before_OD = rho * growth, keep_OD
                del inverse_DD
                inverse_DD = problem.inverse(rho)
        return keep_OD, state_OD
