"""A mask that comes little by little: which weights go is chosen again and again while the others learn to do without.

How many go is what another mask says: of every row or, under an N:M pattern, of every group. Which, Wanda's score says
of the weights as they are by then; one that went may come back. Source of the schedule: Zhu and Gupta, "To prune, or
not to prune" (1710.01878), equation 1, from a sparsity of 0.
"""

from collections.abc import Mapping

import torch

from pipeline.methods.wanda import wanda_scores
from pipeline.sparsity import row_ranks, row_slabs

NUM_STAGES = 20
"""Times the mask is chosen."""

RAMP = 0.5
"""Part of all updates after which the mask stays as it is."""


class GradualMask:
    """The masks of a block's linears, True = kept: nothing goes at first, in the end as much as another mask drops."""

    def __init__(
        self,
        wanted: Mapping[str, torch.Tensor],
        norms: Mapping[str, torch.Tensor],
        group: int | None,
        num_updates: int,
    ) -> None:
        """`wanted`: keep_OD that says how many go. `norms`: norm_D of the inputs. `group`: of an N:M pattern."""
        self.keep = {name: torch.ones_like(keep_OD) for name, keep_OD in wanted.items()}
        self._wanted, self._norms, self._group = wanted, norms, group
        self._num_updates = int(RAMP * num_updates)
        self._stage = 0

    @property
    def is_settled(self) -> bool:
        """Whether it stays as it is."""
        return self._stage == NUM_STAGES

    @torch.no_grad()
    def follow(self, weights: Mapping[str, torch.Tensor], update: int) -> None:
        """Choose, where it is time, before the update of that number (from 0); `weights`: weight_OD as they are now."""
        over = update >= self._num_updates
        stage = NUM_STAGES if over else NUM_STAGES * update // self._num_updates
        if stage == self._stage:
            return
        self._stage = stage
        part = 1 - (1 - stage / NUM_STAGES) ** 3
        for name, weight_OD in weights.items():
            for rows in row_slabs(*weight_OD.shape):
                score_RD = wanda_scores(weight_OD[rows], self._norms[name])
                self.keep[name][rows] = _chosen(score_RD, self._wanted[name][rows], self._group, part)


def _chosen(score_RD: torch.Tensor, wanted_RD: torch.Tensor, group: int | None, part: float) -> torch.Tensor:
    """Return keep_RD without a part of what is to go in the end: of each row the lowest scores of it."""
    if group is not None:
        num_going = (~wanted_RD).reshape(-1, group).sum(dim=1, keepdim=True)
        going_RD = (row_ranks(score_RD.reshape(-1, group)) < num_going).view_as(score_RD)
        score_RD = score_RD.masked_fill_(~going_RD, torch.inf)
    num_gone = ((~wanted_RD).sum(dim=1, keepdim=True, dtype=torch.float64) * part).floor()
    return row_ranks(score_RD) >= num_gone
