"""Fit the kept weights of a linear to its dense output, or find out which to keep while doing so.

Inputs with the Gram matrix G are scaled to unit power: with N = diag(G)^1/2, weights become w N and the Gram matrix
becomes H = N^-1 G N^-1 + damping I. One row w of a linear with the dense weights b then errs by

    f(w) = (w - b) N H N (w - b)^T,

the squared error of its outputs plus a ridge that ties every weight to its dense value. Rows never meet in it.
Minimising f under a mask is a linear least-squares problem; ADMM and conjugate gradients solve it for all rows at once.

Scaled weights have names of their own: `point_RD`, `dense_RD`. Shapes: R = some rows, D = in features.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from pipeline.methods.factorise import DAMPING_LIMIT, with_damping_enough
from pipeline.methods.step import LinearStep, LinearView, PrunedLinear
from pipeline.statistics import Gram, Statistic

WEIGHT_BYTES = 25
"""Bytes a weight takes while it is fitted: six numbers in float32 and its mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """The problem that all rows of all linears with the same input share."""

    gram_DD: torch.Tensor
    """G, float32, as it was gathered."""

    norm_D: torch.Tensor
    """diag(G)^1/2; 0 for input features that were never active (dead)."""

    divisor_D: torch.Tensor
    """The same, with 1 for dead features."""

    damping: float
    """Ridge, as a multiple of each input feature's power."""

    @classmethod
    def of(cls, gram_DD: torch.Tensor, damping: float) -> Self:
        """Return the problem, damped as much as it takes to be convex; raises NumericsError where nothing helps."""
        norm_D = gram_DD.diagonal().sqrt()
        divisor_D = norm_D.masked_fill(norm_D == 0, 1)
        _, used = with_damping_enough(lambda d: _cholesky(gram_DD, divisor_D, d), damping, torch.ones_like(norm_D))
        return cls(gram_DD=gram_DD, norm_D=norm_D, divisor_D=divisor_D, damping=used)

    def inverse(self, rho: float) -> torch.Tensor:
        """Return (H + rho I)^-1 [D, D]; at most two matrices of its size are alive on the way."""
        lower_DD = _cholesky(self.gram_DD, self.divisor_D, self.damping + rho)
        assert lower_DD is not None, "H itself is positive definite"
        return torch.cholesky_inverse(lower_DD)

    def scaled(self, weight_RD: torch.Tensor) -> torch.Tensor:
        """Return weights times the norms of their inputs, float32; their sizes are Wanda's scores."""
        return weight_RD.float() * self.norm_D

    def unscaled(self, point_RD: torch.Tensor, dense_RD: torch.Tensor, keep_RD: torch.Tensor) -> torch.Tensor:
        """Return the weights that a scaled point stands for, in place; those of dead features stay `dense_RD`."""
        weight_RD = torch.where(self.norm_D == 0, dense_RD.float(), point_RD.div_(self.divisor_D))
        return weight_RD.masked_fill_(~keep_RD, 0)

    def times(self, point_RD: torch.Tensor) -> torch.Tensor:
        """Return scaled points times H."""
        product_RD = (point_RD / self.divisor_D) @ self.gram_DD
        return product_RD.div_(self.divisor_D).add_(point_RD, alpha=self.damping)

    def refine(self, point_RD: torch.Tensor, dense_RD: torch.Tensor, keep_RD: torch.Tensor, num_steps: int) -> None:
        """Move the start, in place, towards the minimum of f among the points that are zero off the mask, as it is.

        Conjugate gradients, each row with its own step sizes. H has a unit diagonal, so it is its own preconditioner.
        No step increases f beyond rounding, and after as many as a row keeps weights it is at the minimum.
        """
        residual_RD = self.times(dense_RD - point_RD).masked_fill_(~keep_RD, 0)
        direction_RD = residual_RD.clone()
        power_R1 = _power(residual_RD)
        for _ in range(num_steps):
            curved_RD = self.times(direction_RD).masked_fill_(~keep_RD, 0)
            length_R1 = _ratio(power_R1, _dot(direction_RD, curved_RD))
            point_RD.addcmul_(direction_RD, length_R1)
            residual_RD.addcmul_(curved_RD, length_R1, value=-1)
            before_R1, power_R1 = power_R1, _power(residual_RD)
            direction_RD.mul_(_ratio(power_R1, before_R1)).add_(residual_RD)


class FittingStep(LinearStep):
    """What methods have in common that end by fitting the kept weights; they differ in how they choose the mask."""

    accepts_mask: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    damping: float = Field(default=0.1, gt=0, le=DAMPING_LIMIT)
    """Ridge that ties weights to their dense values, as a multiple of each input feature's power."""

    scope: Literal["row", "matrix"] = "row"
    """Where weights compete; within their group too, where the sparsity is N:M."""

    refining: int = Field(default=10, ge=0)
    """Steps of conjugate gradients with the final mask."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix: what the error of the outputs is made of."""
        return (Gram,)

    @property
    @abstractmethod
    def num_products(self) -> int:
        """Products of each linear with a matrix of its input, where it chooses the mask."""

    @abstractmethod
    def num_inverses(self, num_linears: int) -> int:
        """Return how many matrices are inverted for the linears of one input."""


Choice = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Given the scaled dense weights of some rows: their mask, and the scaled weights from which to refine."""


def fit(
    view: LinearView, problem: LeastSquares, choose: Choice, num_steps: int, rows_at_once: int | None = None
) -> PrunedLinear:
    """Prune one linear, some of its rows at a time: choose a mask where none is given, then refine the kept weights.

    Where a mask is given, they start from the values that the steps before have left them.
    """
    keep_OD = torch.empty(view.dense_OD.shape, dtype=torch.bool, device=view.dense_OD.device)
    weight_OD = torch.empty_like(view.dense_OD, memory_format=torch.contiguous_format)
    for start in range(0, len(keep_OD), rows_at_once or len(keep_OD)):
        rows = slice(start, start + (rows_at_once or len(keep_OD)))
        part = view.rows(rows)
        dense_RD = problem.scaled(part.dense_OD)
        if part.keep_OD is None:
            keep_RD, point_RD = choose(dense_RD)
        else:
            keep_RD, point_RD = part.keep_OD, problem.scaled(part.weight_OD)
        point_RD.masked_fill_(~keep_RD, 0)
        problem.refine(point_RD, dense_RD, keep_RD, num_steps)
        keep_OD[rows] = keep_RD
        weight_OD[rows] = problem.unscaled(point_RD, part.dense_OD, keep_RD)
    return PrunedLinear(keep_OD=keep_OD, weight_OD=weight_OD, notes={"damping": problem.damping})


def split_step(
    state_RD: torch.Tensor, keep_RD: torch.Tensor, dense_RD: torch.Tensor, inverse_DD: torch.Tensor, rho: float
) -> None:
    """Take one step of ADMM on f, in place: `inverse_DD` is (H + rho I)^-1.

    The state is the papers' w + u. Its kept entries are the sparse copy z, its pruned ones the multiplier u, so that
    the next w = b + rho (z - u - b) (H + rho I)^-1 needs no other memory.
    """
    pull_RD = torch.where(keep_RD, state_RD, -state_RD).sub_(dense_RD)
    state_RD.masked_fill_(keep_RD, 0).add_(dense_RD).addmm_(pull_RD, inverse_DD, alpha=rho)


def _cholesky(gram_DD: torch.Tensor, divisor_D: torch.Tensor, added: float) -> torch.Tensor | None:
    """Return the lower factor of the scaled Gram matrix plus `added` I; None where that is not positive definite."""
    scaled_DD = (gram_DD / divisor_D).div_(divisor_D[:, None])
    scaled_DD.diagonal().add_(added)
    lower_DD, failed = torch.linalg.cholesky_ex(scaled_DD)
    return None if failed else lower_DD


def _dot(left_RD: torch.Tensor, right_RD: torch.Tensor) -> torch.Tensor:
    dot_R: torch.Tensor = torch.linalg.vecdot(left_RD, right_RD)
    return dot_R[:, None]


def _power(point_RD: torch.Tensor) -> torch.Tensor:
    return _dot(point_RD, point_RD)


def _ratio(above_R1: torch.Tensor, below_R1: torch.Tensor) -> torch.Tensor:
    """Divide; 0 where there is nothing left to divide by, so that a finished row stays where it is."""
    return torch.where(below_R1 > 0, above_R1 / below_R1, 0)
