"""One linear as BESA learns it: its ranks, the parameters of its sparsities, and of its grids where it is quantised.

Shapes: O = out features, D = in features, P = candidate sparsities, G = groups (O, or 1 for a whole linear), Q = grids
of a row; the leading 2 of clipping parameters stands for the lower and the upper end.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from pipeline.lazy_weights import Maker
from pipeline.methods.quantisation import QuantisedMaskedWeight, Quantize, quantised_slab, strengths
from pipeline.methods.row_sparsity import (
    NUM_CANDIDATES,
    MaskedWeight,
    SlabOf,
    candidate_sparsities,
    hard_keep,
    masked,
    nearest_counts,
    pruned_counts,
    shares,
    tilt_towards,
)
from pipeline.methods.step import PrunedLinear
from pipeline.methods.wanda import wanda_scores
from pipeline.sparsity import SemiStructured, Sparsity, map_rows, rank_dtype, row_ranks

Granularity = Literal["row", "linear"]


def num_candidates(sparsity: Sparsity) -> int:
    """Return how many sparsities a group chooses from: every percent, or every count of an N:M group."""
    return sparsity.group + 1 if isinstance(sparsity, SemiStructured) else NUM_CANDIDATES


def stretch_of(sparsity: Sparsity, num_columns: int) -> int:
    """Return how many columns are ranked together: those of an N:M group, or all."""
    return sparsity.group if isinstance(sparsity, SemiStructured) else num_columns


def own_pattern(sparsity: Sparsity, count_O: torch.Tensor) -> SemiStructured | None:
    """Return what a linear of an N:M mix has come to: the tightest pattern that all its rows hold.

    Rows drop 1 to M - 1 of a group, so there always is one, and steps that follow stay within groups by it. None where
    nothing but a fraction was asked.
    """
    if not isinstance(sparsity, SemiStructured):
        return None
    return SemiStructured(keep=sparsity.group - int(count_O.min()), group=sparsity.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnable:
    """One linear with the parameters of what it learns."""

    name: str
    weight_OD: torch.Tensor
    rank_OD: torch.Tensor
    """Rank within the row, or within the N:M group."""

    theta_GP: torch.Tensor
    tilt_P: torch.Tensor
    reach: float
    sparsity: Sparsity
    quantize: Quantize | None = None
    clip_2OQ: torch.Tensor | None = None

    @property
    def stretch(self) -> int:
        """Columns ranked together."""
        return stretch_of(self.sparsity, self.weight_OD.shape[1])

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is learnt, float32."""
        return [self.theta_GP] if self.clip_2OQ is None else [self.theta_GP, self.clip_2OQ]

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of the parameters; zeros where a replica without sequences has none."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def shares(self) -> torch.Tensor:
        """Return each group's distribution over candidate sparsities, float32 [G, P]."""
        return shares(self.theta_GP, self.tilt_P, self.reach)

    def alphas(self, share_GP: torch.Tensor) -> torch.Tensor:
        """Return the sparsity of each group, float32 [G]."""
        return share_GP @ candidate_sparsities(share_GP.device, share_GP.shape[1])

    def counts(self, share_GP: torch.Tensor) -> torch.Tensor:
        """Return how many weights of each stretch go at present, int64 [G]."""
        alpha_G = self.alphas(share_GP.detach())
        if isinstance(self.sparsity, SemiStructured):
            return nearest_counts(alpha_G, self.stretch)
        return pruned_counts(alpha_G, self.stretch)

    def maker(self, share_GP: torch.Tensor) -> Maker:
        """Return what makes the weight under its present hard mask, differentiable in all that is learnt."""
        fixed = (self.weight_OD, self.rank_OD, self.counts(share_GP), self.stretch)
        if self.quantize is None or self.clip_2OQ is None:
            return partial(MaskedWeight.apply, share_GP, *fixed)
        return partial(QuantisedMaskedWeight.apply, share_GP, strengths(self.clip_2OQ), *fixed, self.quantize)

    def maker_of(self, count_O: torch.Tensor) -> Maker:
        """Return what makes the weight with `count` weights of every stretch of a row dropped."""
        count_O = count_O.to(self.rank_OD.device)
        return partial(masked, self._values(), self.weight_OD, self.rank_OD, count_O)

    def _values(self) -> SlabOf:
        """Return what gives slabs of weights as they will be written, less the mask."""
        if self.quantize is None or self.clip_2OQ is None:
            return self.weight_OD.__getitem__
        return partial(quantised_slab, self.weight_OD, strengths(self.clip_2OQ).detach(), self.quantize)

    @torch.no_grad()
    def pruned(self, count_O: torch.Tensor) -> PrunedLinear:
        """Return the linear with `count` weights of every stretch of a row dropped."""
        share = count_O.double() / self.stretch
        notes = {"row_sparsity_min": share.min().item(), "row_sparsity_max": share.max().item()}
        keep_OD = hard_keep(self.rank_OD, count_O.to(self.rank_OD.device))
        own = own_pattern(self.sparsity, count_O)
        if self.quantize is None or self.clip_2OQ is None:
            return PrunedLinear(keep_OD=keep_OD, notes=notes, sparsity=own)
        weight_OD = self.maker_of(count_O)().add_(0.0)  # a pruned -1 is -0.0 until then
        low, high = strengths(self.clip_2OQ).mean(dim=(1, 2)).tolist()
        notes |= {"bits": float(self.quantize.bits), "clip_low_mean": low, "clip_high_mean": high}
        return PrunedLinear(keep_OD=keep_OD, weight_OD=weight_OD, notes=notes, sparsity=own)


def learnable(
    name: str,
    weight_OD: torch.Tensor,
    norm_D: torch.Tensor,
    sparsity: Sparsity,
    granularity: Granularity,
    reach: float,
    quantize: Quantize | None,
) -> Learnable:
    """Return a linear that has learnt nothing yet: at the target's sparsity, its ranks by Wanda's scores."""
    num_rows, num_columns = weight_OD.shape
    stretch, device, num = stretch_of(sparsity, num_columns), weight_OD.device, num_candidates(sparsity)

    def ranks(rows_RD: torch.Tensor) -> torch.Tensor:
        return row_ranks(wanda_scores(rows_RD, norm_D).reshape(-1, stretch)).view(rows_RD.shape)

    num_groups = num_rows if granularity == "row" else 1
    clip_2OQ = None
    if quantize is not None:
        shape = (2, num_rows, quantize.num_grids(num_columns))
        clip_2OQ = torch.zeros(shape, device=device, requires_grad=True)
    return Learnable(
        name=name,
        weight_OD=weight_OD,
        rank_OD=map_rows(ranks, weight_OD, rank_dtype(stretch)),
        theta_GP=torch.zeros(num_groups, num, device=device, requires_grad=True),
        tilt_P=tilt_towards(sparsity.ratio, device, num),
        reach=reach,
        sparsity=sparsity,
        quantize=quantize,
        clip_2OQ=clip_2OQ,
    )
