"""Which neurons or heads go: those whose loss the others can make up for best, in rounds, each tuning the mask anew.

With G of a `MaskProblem`, its ridge included, and H its inverse, `kappa_j = sqrt(G_jj H_jj)` tells how well the others
span unit j: 1 where they do not at all (Stewart's collinearity index; its square is the variance inflation factor). A
unit's importance is

    condition   S_j = m_j^2 / H_jj = m_j^2 G_jj / kappa_j^2: exactly what the squared error rises by when unit j goes
                and all others are rescaled as is best (the surgeon's formula, for a mask instead of weights)
    forward     sqrt(G_jj), what the unit alone carries to the output: Wanda's score of a column, in the l2 norm
    kappa       1 / kappa_j^2 alone, without the unit's size: to see what that does

The formula is exact at the optimum only, so units go in rounds, and after each the mask and H become those of the
units that are left. With P removed and R the rest, nothing has to be factorised again:

    m_R <- m_R - H_RP H_PP^-1 m_P        H_RR <- H_RR - H_RP H_PP^-1 H_PR

A mask that strays far from 1 fits the calibration tokens more than the language. Where its variance passes a bound, the
round is undone: either no more units go (`stop`; what is unmet is for other blocks to lose), or the mask stays as it
was from then on while they go (`freeze`, where all blocks are to have one width).

For U units, k of which go: 4/3 U^3 operations for H, and 2 U^2 k for the rounds, all in float64. In memory: H (which
takes the place of G), W in float64 while G is made, and some rows of H, U by k / rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from pipeline.methods.structured.mask_problem import MaskProblem

Metric = Literal["condition", "forward", "kappa"]
"""How a unit's importance is judged."""

AtBound = Literal["stop", "freeze"]
"""What happens where the mask's variance would pass its bound: no more units go, or the mask stays as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Units that stay, and how they are to be rescaled."""

    keep_U: torch.Tensor
    """bool, True = kept."""

    mask_U: torch.Tensor
    """float64, 0 where pruned; all ones for `forward`, which tunes nothing."""

    num_unmet: int
    """Units that were to go, and have not."""

    rise: float
    """What the (damped) squared error is by now, added up over the rounds; exact unless the mask was frozen."""

    notes: dict[str, float]
    """Figures worth recording."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How units are selected."""

    metric: Metric = "condition"
    num_rounds: int = 16
    damping: float = 0.01
    """Ridge of H, as a multiple of the mean of the diagonal of G."""

    mask_var_max: float = 0.01
    """The largest variance of the kept entries of the mask."""

    at_bound: AtBound = "stop"


def select(problem: MaskProblem, num_pruned: int, how: Rounds, num_pools: int = 1) -> Selection:
    """Choose the units that go.

    num_pools: units are split into so many runs of equal length, of which each loses `num_pruned` units (query heads
    of one key-value head); a round takes as many from each. Raises NumericsError where G cannot be factorised.
    """
    if how.metric == "forward":
        keep_U = keep_without_lowest(problem.sizes(), num_pruned, num_pools)
        return Selection(keep_U=keep_U, mask_U=keep_U.double(), num_unmet=0, rise=0.0, notes={})
    inverse_UU, damping = problem.inverse(how.damping)
    size_U = problem.sizes() + problem.ridge(damping)
    kappa_U = (size_U * inverse_UU.diagonal()).sqrt()
    selecting = _Selecting(inverse_UU, _importance(how.metric, size_U), how)
    num_unmet = selecting.run(num_pruned, num_pools) * num_pools
    kept_K = selecting.mask_U[selecting.keep_U]
    notes = {
        "damping": damping,
        "kappa_median": kappa_U.median().item(),
        "kappa_max": kappa_U.max().item(),
        "mask_min": kept_K.min().item(),
        "mask_max": kept_K.max().item(),
        "mask_variance": kept_K.var(correction=0).item(),
    }
    return Selection(
        keep_U=selecting.keep_U, mask_U=selecting.mask_U, num_unmet=num_unmet, rise=selecting.rise, notes=notes
    )


def keep_without_lowest(score_U: torch.Tensor, num_pruned: int, num_pools: int = 1) -> torch.Tensor:
    """Return keep_U that drops the `num_pruned` lowest of every pool; of equal ones, those that come first."""
    order_PV = score_U.view(num_pools, -1).argsort(dim=1, stable=True)
    keep_PV = torch.ones_like(order_PV, dtype=torch.bool)
    return keep_PV.scatter_(1, order_PV[:, :num_pruned], value=False).flatten()


Importance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Given the mask and the diagonal of H, [U] each: what to keep the highest of."""


def _importance(metric: Metric, size_U: torch.Tensor) -> Importance:
    if metric == "kappa":
        return lambda mask_U, diagonal_U: 1 / (size_U * diagonal_U)
    return lambda mask_U, diagonal_U: mask_U.square() / diagonal_U


class _Selecting:
    """A mask, and the H of the units that are left, round by round."""

    def __init__(self, inverse_UU: torch.Tensor, importance: Importance, how: Rounds) -> None:
        self._inverse_UU, self._importance, self._how = inverse_UU, importance, how
        self.mask_U = torch.ones_like(inverse_UU.diagonal())
        self.keep_U = torch.ones_like(self.mask_U, dtype=torch.bool)
        self.rise = 0.0
        self._is_frozen = False

    def run(self, num_pruned: int, num_pools: int) -> int:
        """Remove units; return how many of a pool have stayed against what was asked."""
        num_rounds = self._how.num_rounds
        targets = [num_pruned * number // num_rounds for number in range(num_rounds + 1)]
        for done, target in pairwise(targets):
            if target > done and not self._round(target, num_pools):
                return num_pruned - done
        return 0

    def _round(self, num_gone: int, num_pools: int) -> bool:
        """Bring each pool down to `num_gone` units less than at first; False where the bound forbids it."""
        score_U = self._importance(self.mask_U, self._inverse_UU.diagonal()).masked_fill_(~self.keep_U, -torch.inf)
        keep_U = keep_without_lowest(score_U, num_gone, num_pools)
        going = (self.keep_U & ~keep_U).nonzero()[:, 0]
        gone_P = self.mask_U[going]
        among_PP = torch.linalg.cholesky(self._inverse_UU[going][:, going])
        weighed_P = torch.cholesky_solve(gone_P[:, None], among_PP)[:, 0]
        mask_U = (self.mask_U - weighed_P @ self._inverse_UU[going]).masked_fill_(~keep_U, 0)
        if self._is_frozen or mask_U[keep_U].var(correction=0) > self._how.mask_var_max:
            if self._how.at_bound == "stop":
                return False
            self._is_frozen, mask_U = True, self.mask_U.masked_fill(~keep_U, 0)
        self.mask_U, self.keep_U = mask_U, keep_U
        self.rise += (gone_P @ weighed_P).item()
        half_PU = torch.linalg.solve_triangular(among_PP, self._inverse_UU[going], upper=False)
        self._inverse_UU.addmm_(half_PU.T, half_PU, alpha=-1)
        self._inverse_UU[going] = 0
        self._inverse_UU[:, going] = 0
        return True
