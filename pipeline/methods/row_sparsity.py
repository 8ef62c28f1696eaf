"""Learnable sparsities: the parametrisation BESA optimises, its gradient in closed form, its exact budget.

A group of weights (one row, or all rows of a linear) owns a distribution over candidate sparsities
p = 0, 0.01, …, 1. Its sparsity is the mean of that distribution, `alpha = sum_i s_i p_i`, and the hard mask of a
row drops the floor(D * alpha) weights of lowest rank.

Weights are ranked in stretches of consecutive columns, of which each loses as many as its row says: one stretch of
all D columns, or for N:M patterns D / M of them, with the candidates 0, 1/M, …, 1.

Shapes: O = out features, D = in features, R = rows of a slab, S = columns of a stretch, P = candidates, G = groups
(O, or 1 for a whole linear).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.sparsity import row_slabs

NUM_CANDIDATES = 101


def candidate_sparsities(device: torch.device, num_candidates: int = NUM_CANDIDATES) -> torch.Tensor:
    """Return p_P, evenly spaced from 0 to 1 (0, 0.01, …, 1 unless told otherwise), in float32."""
    return torch.linspace(0, 1, num_candidates, dtype=torch.float64, device=device).float()


def tilt_towards(target: float, device: torch.device, num_candidates: int = NUM_CANDIDATES) -> torch.Tensor:
    """Return logits_P, float32, whose softmax has mean `target`.

    `logit_i = slope * p_i`: of all distributions with that mean, the one of largest entropy (uniform at 0.5). The
    slope is found by bisection; any target strictly between 0 and 1 is reached.
    """
    candidate_P = torch.linspace(0, 1, num_candidates, dtype=torch.float64)
    low, high = -1e4, 1e4
    for _ in range(100):
        slope = (low + high) / 2
        mean = (torch.softmax(slope * candidate_P, dim=0) * candidate_P).sum()
        low, high = (slope, high) if mean < target else (low, slope)
    return (slope * candidate_P).float().to(device)


def shares(theta_GP: torch.Tensor, tilt_P: torch.Tensor, reach: float) -> torch.Tensor:
    """Return each group's distribution over candidates, `softmax(tilt + reach * sigmoid(theta))`, float32 [G, P].

    At theta = 0 its mean is the target of the tilt. The sigmoid lets shares differ from the tilt's by a factor of
    at most e^reach, which keeps rows within reach of the target (0.38…0.62 for target 0.5 and reach 1) however
    few the updates; the released code is this with no tilt and reach 1.
    """
    return torch.softmax(tilt_P + reach * torch.sigmoid(theta_GP), dim=1)


def hard_keep(rank_OD: torch.Tensor, num_pruned_G: torch.Tensor) -> torch.Tensor:
    """Return keep_OD that drops the `num_pruned` lowest ranks of each row."""
    return rank_OD >= num_pruned_G.to(rank_OD.dtype)[:, None]


def pruned_counts(alpha_G: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return floor(D * alpha) per group, int64; a hair is added so that 0.5 of D is D / 2 in spite of float32."""
    return (alpha_G.double() * num_columns * (1 + 1e-6)).floor().long().clamp_(0, num_columns)


def nearest_counts(alpha_G: torch.Tensor, group: int) -> torch.Tensor:
    """Return the whole count nearest to M * alpha per group, int64: what an N:M group drops, 1 to M - 1."""
    return (alpha_G.double() * group).round().long().clamp_(1, group - 1)


class MaskedWeight(torch.autograd.Function):
    """W * hard mask forward; gradient of the soft keep probabilities backward (BESA's straight-through estimator).

    The soft mask keeps weight (r, j) with probability `K_rj = 1 - sum_i s_ri [rank_rj < n_i]`, n_i = floor(S p_i).
    With g = dL/dW_eff * W this gives `dL/ds_ri = - sum_{j: rank_rj < n_i} g_rj`: the prefix sums of g in rank
    order, read at the n_i. Neither K nor its autograd graph is ever formed; the cost per weight is its rank
    (2 bytes, 1 in patterns). Ranks are unique within a stretch, so the scatter has no collisions and the result is
    deterministic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        share_GP: torch.Tensor,
        weight_OD: torch.Tensor,
        rank_OD: torch.Tensor,
        counts_G: torch.Tensor,
        stretch: int | None = None,
    ) -> torch.Tensor:
        """Return W * [rank >= count], in the weight's dtype; stretch: columns ranked together, all when None."""
        ctx.save_for_backward(weight_OD, rank_OD)
        ctx.shape_GP, ctx.stretch = share_GP.shape, stretch
        return masked(weight_OD.__getitem__, weight_OD, rank_OD, counts_G)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Return dL/dshare_GP."""
        weight_OD, rank_OD = ctx.saved_tensors
        return (
            share_gradient(grads[0], weight_OD.__getitem__, rank_OD, ctx.shape_GP, ctx.stretch),
            None,
            None,
            None,
            None,
        )


SlabOf = Callable[[slice], torch.Tensor]
"""Gives the weights [R, D] of a slab of rows."""


def masked(weights: SlabOf, like_OD: torch.Tensor, rank_OD: torch.Tensor, counts_G: torch.Tensor) -> torch.Tensor:
    """Return weight * [rank >= count] in the dtype and layout of `like`; temporaries are those of a slab of rows."""
    masked_OD, counts_O = torch.empty_like(like_OD), counts_G.expand(len(like_OD))
    for rows in row_slabs(*like_OD.shape):
        torch.mul(weights(rows), hard_keep(rank_OD[rows], counts_O[rows]), out=masked_OD[rows])
    return masked_OD


def share_gradient(
    grad_OD: torch.Tensor, weights: SlabOf, rank_OD: torch.Tensor, shape_GP: tuple[int, int], stretch: int | None
) -> torch.Tensor:
    """Return dL/dshare_GP, float32, of a loss whose gradient in the masked weight is given."""
    num_groups, num_candidates = shape_GP
    prefix_OP = prefix_at_candidates(grad_OD, weights, rank_OD, num_candidates, stretch)
    return (prefix_OP.sum(dim=0, keepdim=True) if num_groups == 1 else prefix_OP).neg_()


def prefix_at_candidates(
    grad_OD: torch.Tensor,
    weights: SlabOf,
    rank_OD: torch.Tensor,
    num_candidates: int = NUM_CANDIDATES,
    stretch: int | None = None,
) -> torch.Tensor:
    """Return, per row and candidate, the sum of grad * weight over the floor(S p_i) lowest ranks: float32 [O, P]."""
    num_rows, num_columns = rank_OD.shape
    width = stretch or num_columns
    boundary_P = torch.arange(num_candidates, device=rank_OD.device) * width // (num_candidates - 1)
    prefix_OP = torch.empty(num_rows, num_candidates, device=rank_OD.device)
    for rows in row_slabs(num_rows, num_columns):
        gain = (grad_OD[rows].float() * weights(rows).float()).reshape(-1, width)
        ranked = gain.new_zeros(len(gain), width + 1)
        ranked[:, 1:].scatter_(1, rank_OD[rows].view(-1, width).long(), gain)
        by_rank = ranked.view(-1, num_columns // width, width + 1).sum(dim=1)
        prefix_OP[rows] = by_rank.cumsum_(dim=1)[:, boundary_P]
    return prefix_OP


def project_to_budget(
    alphas: Sequence[torch.Tensor],
    widths: Sequence[int],
    budget: int,
    units: Sequence[int] | None = None,
    least: int = 0,
) -> list[torch.Tensor]:
    """Turn learnt row sparsities into whole counts that drop `budget` weights together, and not one less.

    alphas: per linear, one sparsity per row (float [O]); widths: what a row counts up to, its length D or the M of a
    pattern; units: how many weights go with one count, 1 unless given (D / M for a pattern); least: the smallest count
    that a row drops, and that it keeps. All rows are shifted by one scalar, found by bisection, and what rounding
    leaves goes one count at a time to the rows with the largest remainder (ties to the earlier row). With units above 1
    the last one may drop more than was missing, by less than its unit. Returns int64 [O] per linear.
    """
    units = units or [1] * len(widths)
    alpha = torch.cat([a.detach().double().cpu() for a in alphas])
    width, unit = (_per_row(numbers, alphas) for numbers in (widths, units))

    def wanted(shift: float) -> torch.Tensor:
        return ((alpha + shift) * width).clamp(min=least).minimum(width - least)

    low, high = -1.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (wanted(middle).floor() * unit).sum() <= budget else (low, middle)
    exact = wanted(low)
    counts = exact.floor()
    missing = budget - int((counts * unit).sum())
    order = (exact - counts).argsort(descending=True, stable=True)
    num_more = int((unit[order].cumsum(dim=0) < missing).sum()) + 1 if missing > 0 else 0
    counts[order[:num_more]] += 1
    surplus = int((counts * unit).sum()) - budget
    assert 0 <= surplus < max(units), (surplus, budget)
    return [part.long() for part in torch.split(counts, [len(a) for a in alphas])]


def _per_row(numbers: Sequence[int], alphas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one number of each linear at all of its rows, float64."""
    return torch.cat(
        [torch.full((len(a),), float(n), dtype=torch.float64) for a, n in zip(alphas, numbers, strict=True)]
    )
