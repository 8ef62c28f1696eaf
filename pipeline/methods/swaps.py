"""Which weights of a row to swap: by its expected error, as DSnoT does, or by its squared error, exactly.

A swap grows one pruned weight and prunes one kept weight of a row, in an N:M linear of one group of it.

Shapes: R = rows, D = in features, G = groups of a row, M = features of a group, N = candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from pipeline.methods.step import LinearView
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import Moments

NOBODY = -1
"""Stands for a column where there is no candidate left."""

ROUNDING = 1e-12
"""Variances below this part of the mean square are what float64 makes of zero."""

LEAST_GAIN = 1e-5
"""A swap that saves less than this part of a row's squared error is not worth making, and may be rounding."""

CPU_SLAB_NUMEL = 1 << 17
"""Weights swapped at once by squared error on a CPU: what stays in a core's cache through all swaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some rows of a linear, float32."""

    dense_RD: torch.Tensor

    present_RD: torch.Tensor
    """What each weight is while it is there: kept ones as the steps before have left them, pruned ones dense."""

    keep_RD: torch.Tensor
    """bool, the mask that steps before have chosen."""

    sparsity: Sparsity
    """What is met, and goes on being met."""

    @classmethod
    def of(cls, view: LinearView, slab: slice) -> "Rows":
        """Take them from a linear that has a mask."""
        assert view.keep_OD is not None
        dense_RD, keep_RD = view.dense_OD[slab].float(), view.keep_OD[slab]
        present_RD = dense_RD
        if view.updated_OD is not None:
            present_RD = torch.where(keep_RD, view.updated_OD[slab].float(), dense_RD)
        return cls(dense_RD=dense_RD, present_RD=present_RD, keep_RD=keep_RD, sparsity=view.sparsity)

    @property
    def group(self) -> int:
        """Columns among which a swap stays: those of an N:M group, or all."""
        return self.sparsity.group if isinstance(self.sparsity, SemiStructured) else self.keep_RD.shape[1]

    def split(self) -> Iterator["Rows"]:
        """Yield as many at a time as stay in a core's cache; an accelerator has use for all at once."""
        on_cpu, (num_rows, num_columns) = self.keep_RD.device.type == "cpu", self.keep_RD.shape
        num = max(1, CPU_SLAB_NUMEL // num_columns) if on_cpu else num_rows
        for start in range(0, num_rows, num):
            part = slice(start, start + num)
            yield replace(
                self, dense_RD=self.dense_RD[part], present_RD=self.present_RD[part], keep_RD=self.keep_RD[part]
            )

    def missing(self, keep_RD: torch.Tensor) -> torch.Tensor:
        """Return the dense rows less the rows under this mask."""
        return self.dense_RD - self.present_RD * keep_RD

    def errors(self, keep_RD: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
        """Return float64 [3, R]: squared errors under their own mask and under this one, and squared dense outputs."""
        sides = (self.missing(self.keep_RD), self.missing(keep_RD), self.dense_RD)
        return torch.stack([(side_RD @ gram_DD).mul_(side_RD).sum(dim=1, dtype=torch.float64) for side_RD in sides])


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the criteria need to know of every input feature, float32."""

    mean_D: torch.Tensor
    """E[x_j]."""

    steadiness_D: torch.Tensor
    """E[x_j] / Var(x_j); 0 where the mean is 0."""

    norm_D: torch.Tensor
    """||x_j||_2, up to a factor that all share."""

    @classmethod
    def of(cls, moments: Moments) -> "Features":
        """Derive them from the moments; a variance of zero counts as what rounding makes of it."""
        mean_D, power_D = moments.mean_D, moments.mean_squares_D
        variance_D = torch.maximum(moments.variance_D, ROUNDING * power_D)
        steadiness_D = torch.where(mean_D == 0, 0, mean_D / variance_D)
        return cls(mean_D=mean_D.float(), steadiness_D=steadiness_D.float(), norm_D=power_D.sqrt().float())


class Queue:
    """The best candidates of every row, best first, for a positive and for a negative error; each is taken once."""

    def __init__(self, score_RD: torch.Tensor, sign_RD: torch.Tensor, num: int) -> None:
        """Rank the highest `num` scores; sign: the error a column is a candidate for, 1 or -1, or 0 for none."""
        num = min(num, score_RD.shape[1])
        lists = [self._ranked(score_RD.masked_fill(sign_RD != sign, -torch.inf), num) for sign in (1, -1)]
        self._columns_2RN = torch.stack(lists)
        self._taken_2R = torch.zeros_like(self._columns_2RN[:, :, 0])

    @staticmethod
    def _ranked(score_RD: torch.Tensor, num: int) -> torch.Tensor:
        """Return the columns of the highest scores, NOBODY instead of -inf, and NOBODY after the last."""
        best = score_RD.topk(num, dim=1)
        return functional.pad(best.indices.masked_fill_(best.values == -torch.inf, NOBODY), (0, 1), value=NOBODY)

    def take(self, rows: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Return the next column of each of these rows, which have these errors; once it is NOBODY, ask no more."""
        side = (error <= 0).long()
        columns = self._columns_2RN[side, rows, self._taken_2R[side, rows]]
        self._taken_2R[side, rows] += 1
        return columns


class Groups:
    """The kept weights of every N:M group, lowest score first; each is taken once."""

    def __init__(self, score_RD: torch.Tensor, keep_RD: torch.Tensor, group: int) -> None:
        self._score_RGM = score_RD.masked_fill(~keep_RD, torch.inf).reshape(len(score_RD), -1, group)

    def take(self, rows: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        """Return the next column to go in the group of the one that grows, for each of these rows, or NOBODY."""
        size = self._score_RGM.shape[2]
        group = grown // size
        lowest = self._score_RGM[rows, group].min(dim=1)
        self._score_RGM[rows, group, lowest.indices] = torch.inf
        return torch.where(lowest.values.isinf(), NOBODY, group * size + lowest.indices)


def swapped_by_mean(rows: Rows, *, features: Features, cycles: int, tolerance: float, overshoot: bool) -> torch.Tensor:
    """Return keep_RD after swaps that each take a row's expected error towards zero."""
    part_RD = rows.present_RD * features.mean_D
    error_R = (rows.missing(rows.keep_RD) * features.mean_D).sum(dim=1)
    growing, leaving = candidates(rows, features, part_RD.sign(), cycles)
    keep_RD, first_R, going = rows.keep_RD.clone(), error_R.clone(), torch.arange(len(error_R), device=error_R.device)
    for _ in range(cycles):
        going = going[error_R[going].abs() > tolerance]
        if len(going) == 0:
            break
        error = error_R[going]
        grown = growing.take(going, error)
        gone = leaving.take(going, grown) if isinstance(leaving, Groups) else leaving.take(going, error)
        error = error + part_RD[going, gone] - part_RD[going, grown]
        able = (grown != NOBODY) & (gone != NOBODY)
        if not overshoot:
            able &= error * first_R[going] > 0
        going, grown, gone = going[able], grown[able], gone[able]
        keep_RD[going, grown], keep_RD[going, gone] = True, False
        error_R[going] = error[able]
    return keep_RD


def candidates(rows: Rows, features: Features, sign_RD: torch.Tensor, cycles: int) -> tuple[Queue, Queue | Groups]:
    """Return who may grow and who may go; what adds nothing to the expected output is neither."""
    score_RD = rows.present_RD.abs()
    growing = Queue(score_RD * features.steadiness_D.abs(), sign_RD * ~rows.keep_RD, cycles)
    score_RD.mul_(features.norm_D)
    if isinstance(rows.sparsity, SemiStructured):
        return growing, Groups(score_RD, rows.keep_RD, rows.group)
    return growing, Queue(score_RD.neg_(), -sign_RD * rows.keep_RD, cycles)


def swapped_by_error(rows: Rows, *, gram_DD: torch.Tensor, cycles: int) -> torch.Tensor:
    """Return keep_RD after swaps that each lower a row's squared error d G d^T, the best pair first.

    With u_j the change of d_j if weight j is flipped (w_j where kept, -w_j where pruned), flipping j alone costs
    u_j^2 G_jj + 2 u_j (d G)_j, and flipping j after i costs 2 u_i u_j G_ij more. The weight to grow is chosen by its
    cost alone (in an N:M linear that of its group's best leaver added), the weight to go by the exact cost of both.
    A row ends when its best swap gains nothing.
    """
    return torch.cat([_swapped_by_error(part, gram_DD, cycles) for part in rows.split()])


def _swapped_by_error(rows: Rows, gram_DD: torch.Tensor, cycles: int) -> torch.Tensor:
    missing_RD, keep_RD = rows.missing(rows.keep_RD), rows.keep_RD.clone()
    change_RD = torch.where(keep_RD, rows.present_RD, -rows.present_RD)
    cost_RD = missing_RD @ gram_DD
    least_R = LEAST_GAIN * (cost_RD * missing_RD).sum(dim=1)
    cost_RD.mul_(2).addcmul_(change_RD, gram_DD.diagonal()).mul_(change_RD)
    size = rows.group
    going = torch.arange(len(keep_RD), device=keep_RD.device)
    for _ in range(cycles):
        keep = keep_RD[going]
        grown, cost = _cheapest_to_grow(cost_RD, keep, size)
        _flip(cost_RD, change_RD, grown, gram_DD)
        gone, more = _cheapest_to_go(cost_RD, keep, grown, size)
        _flip(cost_RD, change_RD, gone, gram_DD)
        better = cost + more < -least_R
        going, grown, gone = going[better], grown[better], gone[better]
        if len(going) == 0:
            break
        keep_RD[going, grown], keep_RD[going, gone] = True, False
        cost_RD, change_RD, least_R = cost_RD[better], change_RD[better], least_R[better]
    return keep_RD


def _cheapest_to_grow(cost_RD: torch.Tensor, keep_RD: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of every row that is cheapest to grow, counting who could go for it, and its own cost."""
    growing = cost_RD.masked_fill(keep_RD, torch.inf).reshape(len(cost_RD), -1, size).min(dim=2)
    leaving_RG = cost_RD.masked_fill(~keep_RD, torch.inf).reshape(len(cost_RD), -1, size).amin(dim=2)
    group_R1 = (growing.values + leaving_RG).argmin(dim=1, keepdim=True)
    column_R1 = group_R1 * size + growing.indices.gather(1, group_R1)
    return column_R1[:, 0], growing.values.gather(1, group_R1)[:, 0]


def _cheapest_to_go(
    cost_RD: torch.Tensor, keep_RD: torch.Tensor, grown: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kept column that is cheapest to prune in the group that grows, and its cost."""
    every, group = torch.arange(len(grown), device=grown.device), grown // size
    cost_RM = cost_RD.reshape(len(cost_RD), -1, size)[every, group]
    lowest = cost_RM.masked_fill(~keep_RD.reshape(len(cost_RD), -1, size)[every, group], torch.inf).min(dim=1)
    return group * size + lowest.indices, lowest.values


def _flip(cost_RD: torch.Tensor, change_RD: torch.Tensor, column: torch.Tensor, gram_DD: torch.Tensor) -> None:
    """Bring costs up to date, in place, with one weight of every row flipped; to flip it back costs the opposite."""
    column_R1 = column[:, None]
    change_R1, cost_R1 = change_RD.gather(1, column_R1), cost_RD.gather(1, column_R1)
    cost_RD.addcmul_(gram_DD[column].mul_(2 * change_R1), change_RD)
    cost_RD.scatter_(1, column_R1, -cost_R1)
    change_RD.scatter_(1, column_R1, -change_R1)
