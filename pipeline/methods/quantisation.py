"""Fake quantisation: weights moved to a grid of few levels whose ends are learnt, with the gradient in closed form.

Shao et al., "OmniQuant" (2308.13137), learnable weight clipping. Every stretch of consecutive weights of a row has a
grid of its own. With its range [min W, max W] (widened to hold 0), and clipping strengths g0, g1 in (0, 1):

    h = (g1 max W - g0 min W) / (2^b - 1)          the step
    z = round(-g0 min W / h)                       the level of zero
    Wq = h (clamp(round(W / h) + z, 0, 2^b - 1) - z)

Zero is always a level, so a pruned weight is exactly 0. Steps are rounded to bfloat16: integers and such steps, packed,
give back the very weights written here, in whatever dtype they are stored.

Shapes: O = out features, D = in features, R = rows of a slab, Q = grids of a row, S = weights of a grid, P =
candidates, G = groups; the leading 2 stands for g0 and g1.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from pipeline.methods.row_sparsity import hard_keep, masked, share_gradient
from pipeline.sparsity import in_slab, row_slabs

START = 4.0
"""Logit of the clipping strengths before they learn: 0.982 of the range, as in OmniQuant."""

SLOPE = 0.03
"""Logits per unit of the parameters, which are learnt in steps that suit the sparsities: strengths need finer ones."""

QUANTISING_BYTES = 32
"""Bytes a weight of a slab takes while the gradient of its grid is made."""


class Quantize(BaseModel):
    """How weights are quantised; activations never are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bits: int = Field(default=4, ge=2, le=8)
    """Each weight takes one of 2^bits levels."""

    group: int | None = Field(default=128, ge=2)
    """Consecutive input features that share a grid; null: a whole row. The last ones of a row may be fewer."""

    def num_grids(self, num_columns: int) -> int:
        """Return how many grids a row has."""
        return -(-num_columns // (self.group or num_columns))


def slab_bytes(num_weights: int) -> int:
    """Return the temporaries of quantising among that many weights, gradients included."""
    return QUANTISING_BYTES * in_slab(num_weights)


def strengths(clip_2OQ: torch.Tensor) -> torch.Tensor:
    """Return g0 and g1 in (0, 1), float32; 0.982 where the parameters are 0."""
    return torch.sigmoid(START + SLOPE * clip_2OQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """The grids of some rows."""

    low_RQ1: torch.Tensor
    """min W, at most 0."""

    high_RQ1: torch.Tensor
    """max W, at least 0."""

    step_RQ1: torch.Tensor
    """h."""

    zero_RQ1: torch.Tensor
    """z."""

    off_RQ1: torch.Tensor
    """z before it was rounded, less z."""

    top: int
    """2^b - 1, the highest level."""


def in_grids(rows_RD: torch.Tensor, options: Quantize) -> torch.Tensor:
    """Return the rows cut into the stretches of their grids, float32 [R, Q, S], the last one filled up with zeros."""
    num_rows, num_columns = rows_RD.shape
    num_grids = options.num_grids(num_columns)
    size = options.group or num_columns
    padded = torch.nn.functional.pad(rows_RD.float(), (0, num_grids * size - num_columns))
    return padded.reshape(num_rows, num_grids, size)


def grids_of(weight_RQS: torch.Tensor, strength_2RQ: torch.Tensor, bits: int) -> Grids:
    """Return the grids under clipping strengths."""
    low_RQ1 = weight_RQS.amin(dim=2, keepdim=True).clamp_(max=0)
    high_RQ1 = weight_RQS.amax(dim=2, keepdim=True).clamp_(min=0)
    g0_RQ1, g1_RQ1 = strength_2RQ[..., None]
    top = 2**bits - 1
    step_RQ1 = (g1_RQ1 * high_RQ1 - g0_RQ1 * low_RQ1) / top
    step_RQ1 = step_RQ1.bfloat16().float().clamp_(min=torch.finfo(torch.bfloat16).tiny)
    exact_RQ1 = -g0_RQ1 * low_RQ1 / step_RQ1
    zero_RQ1 = exact_RQ1.round().clamp_(0, top)
    off_RQ1 = exact_RQ1 - zero_RQ1
    return Grids(low_RQ1=low_RQ1, high_RQ1=high_RQ1, step_RQ1=step_RQ1, zero_RQ1=zero_RQ1, off_RQ1=off_RQ1, top=top)


@torch.no_grad()
def quantised(rows_RD: torch.Tensor, strength_2RQ: torch.Tensor, options: Quantize) -> torch.Tensor:
    """Return the rows on their grids, in their dtype."""
    weight_RQS = in_grids(rows_RD, options)
    grids = grids_of(weight_RQS, strength_2RQ, options.bits)
    level_RQS = (weight_RQS / grids.step_RQ1).round_().add_(grids.zero_RQ1).clamp_(0, grids.top)
    moved_RQS = level_RQS.sub_(grids.zero_RQ1).mul_(grids.step_RQ1)
    return moved_RQS.flatten(1)[:, : rows_RD.shape[1]].to(rows_RD.dtype)


@torch.no_grad()
def strength_gradient(
    grad_RD: torch.Tensor, rows_RD: torch.Tensor, strength_2RQ: torch.Tensor, options: Quantize
) -> torch.Tensor:
    """Return dL/dg0 and dL/dg1 from dL/dWq, both roundings taken straight through: float32 [2, R, Q].

    A clipped weight sits at an end of its range, g0 min W or g1 max W, and moves with that end. All move with the step
    by what was rounded away: round(W / h) - W / h, or, where clipped, z before it was rounded less z.
    """
    weight_RQS, grad_RQS = in_grids(rows_RD, options), in_grids(grad_RD, options)
    grids = grids_of(weight_RQS, strength_2RQ, options.bits)
    weight_RQS = weight_RQS / grids.step_RQ1
    level_RQS = weight_RQS.round()
    rounded_RQS = level_RQS - weight_RQS
    level_RQS += grids.zero_RQ1
    under_RQS, over_RQS = level_RQS < 0, level_RQS > grids.top
    rounded_RQS = torch.where(under_RQS | over_RQS, grids.off_RQ1, rounded_RQS)
    at_low_RQ, at_high_RQ = ((grad_RQS * end_RQS).sum(dim=2) for end_RQS in (under_RQS, over_RQS))
    by_step_RQ = (grad_RQS * rounded_RQS).sum(dim=2) / grids.top
    low_RQ, high_RQ = grids.low_RQ1[..., 0], grids.high_RQ1[..., 0]
    return torch.stack([(at_low_RQ - by_step_RQ) * low_RQ, (at_high_RQ + by_step_RQ) * high_RQ])


class QuantisedMaskedWeight(torch.autograd.Function):
    """Wq * hard mask forward; backward as `MaskedWeight` in the shares, and straight through in the strengths.

    The quantised weight is formed a slab of rows at a time, in every pass anew; nothing per weight is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        share_GP: torch.Tensor,
        strength_2OQ: torch.Tensor,
        weight_OD: torch.Tensor,
        rank_OD: torch.Tensor,
        counts_G: torch.Tensor,
        stretch: int,
        options: Quantize,
    ) -> torch.Tensor:
        """Return Wq * [rank >= count], in the weight's dtype."""
        ctx.save_for_backward(strength_2OQ, weight_OD, rank_OD, counts_G)
        ctx.shape_GP, ctx.stretch, ctx.options = share_GP.shape, stretch, options
        return masked(partial(quantised_slab, weight_OD, strength_2OQ, options), weight_OD, rank_OD, counts_G)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return dL/dshare_GP and dL/dstrength_2OQ."""
        strength_2OQ, weight_OD, rank_OD, counts_G = ctx.saved_tensors
        slab = partial(quantised_slab, weight_OD, strength_2OQ, ctx.options)
        share_grad_GP = share_gradient(grads[0], slab, rank_OD, ctx.shape_GP, ctx.stretch)
        strength_grad_2OQ, counts_O = torch.empty_like(strength_2OQ), counts_G.expand(len(weight_OD))
        for rows in row_slabs(*weight_OD.shape):
            through_RD = grads[0][rows] * hard_keep(rank_OD[rows], counts_O[rows])
            strength_grad_2OQ[:, rows] = strength_gradient(
                through_RD, weight_OD[rows], strength_2OQ[:, rows], ctx.options
            )
        return share_grad_GP, strength_grad_2OQ, None, None, None, None, None


def quantised_slab(weight_OD: torch.Tensor, strength_2OQ: torch.Tensor, options: Quantize, rows: slice) -> torch.Tensor:
    """Return some rows on their grids."""
    return quantised(weight_OD[rows], strength_2OQ[:, rows], options)
