"""Learnable sparsities: the parametrisation BESA optimises, its gradient in closed form, its exact budget.

A group of weights (one row, or all rows of a linear) owns a distribution over candidate sparsities
p = 0, 0.01, …, 1. Its sparsity is the mean of that distribution, `alpha = sum_i s_i p_i`, and the hard mask of a
row drops the floor(D * alpha) weights of lowest rank.

Shapes: O = out features, D = in features, P = candidates, G = groups (O, or 1 for a whole linear).
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.sparsity import row_slabs

NUM_CANDIDATES = 101


def candidate_sparsities(device: torch.device) -> torch.Tensor:
    """Return p_P = 0, 0.01, …, 1 in float32."""
    return torch.linspace(0, 1, NUM_CANDIDATES, dtype=torch.float64, device=device).float()


def tilt_towards(target: float, device: torch.device) -> torch.Tensor:
    """Return logits_P, float32, whose softmax has mean `target`.

    `logit_i = slope * p_i`: of all distributions with that mean, the one of largest entropy (uniform at 0.5). The
    slope is found by bisection; any target strictly between 0 and 1 is reached.
    """
    candidate_P = torch.linspace(0, 1, NUM_CANDIDATES, dtype=torch.float64)
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


class MaskedWeight(torch.autograd.Function):
    """W * hard mask forward; gradient of the soft keep probabilities backward (BESA's straight-through estimator).

    The soft mask keeps weight (r, j) with probability `K_rj = 1 - sum_i s_ri [rank_rj < n_i]`, n_i = floor(D p_i).
    With g = dL/dW_eff * W this gives `dL/ds_ri = - sum_{j: rank_rj < n_i} g_rj`: the prefix sums of g in rank
    order, read at the n_i. Neither K nor its autograd graph is ever formed; the cost per weight is its rank
    (2 bytes). Ranks are unique within a row, so the scatter has no collisions and the result is deterministic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        share_GP: torch.Tensor,
        weight_OD: torch.Tensor,
        rank_OD: torch.Tensor,
        counts_G: torch.Tensor,
    ) -> torch.Tensor:
        """Return W * [rank >= count], in the weight's dtype."""
        ctx.save_for_backward(weight_OD, rank_OD)
        ctx.num_groups = len(share_GP)
        return masked_weight(weight_OD, rank_OD, counts_G)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return dL/dshare_GP."""
        weight_OD, rank_OD = ctx.saved_tensors
        prefix_OP = prefix_at_candidates(grads[0], weight_OD, rank_OD)
        if ctx.num_groups == 1:
            prefix_OP = prefix_OP.sum(dim=0, keepdim=True)
        return prefix_OP.neg_(), None, None, None


def masked_weight(weight_OD: torch.Tensor, rank_OD: torch.Tensor, counts_G: torch.Tensor) -> torch.Tensor:
    """Return W * [rank >= count] in the weight's dtype and layout; temporaries are those of a slab of rows."""
    masked_OD, counts_O = torch.empty_like(weight_OD), counts_G.expand(len(weight_OD))
    for rows in row_slabs(*weight_OD.shape):
        torch.mul(weight_OD[rows], hard_keep(rank_OD[rows], counts_O[rows]), out=masked_OD[rows])
    return masked_OD


def prefix_at_candidates(grad_OD: torch.Tensor, weight_OD: torch.Tensor, rank_OD: torch.Tensor) -> torch.Tensor:
    """Return, per row and candidate, the sum of grad * weight over the floor(D p_i) lowest ranks: float32 [O, P]."""
    num_rows, num_columns = weight_OD.shape
    boundary_P = torch.arange(NUM_CANDIDATES, device=weight_OD.device) * num_columns // (NUM_CANDIDATES - 1)
    prefix_OP = torch.empty(num_rows, NUM_CANDIDATES, device=weight_OD.device)
    for rows in row_slabs(num_rows, num_columns):
        gain = grad_OD[rows].float() * weight_OD[rows].float()
        ranked = gain.new_zeros(len(gain), num_columns + 1)
        ranked[:, 1:].scatter_(1, rank_OD[rows].long(), gain)
        prefix_OP[rows] = ranked.cumsum_(dim=1)[:, boundary_P]
    return prefix_OP


def project_to_budget(alphas: Sequence[torch.Tensor], widths: Sequence[int], budget: int) -> list[torch.Tensor]:
    """Turn learnt row sparsities into whole counts whose sum is exactly `budget` weights.

    alphas: per linear, one sparsity per row (float [O]); widths: its row length D. All rows are shifted by one
    scalar, found by bisection, and what rounding leaves goes one weight at a time to the rows with the largest
    remainder (ties to the earlier row). Returns int64 [O] per linear.
    """
    alpha = torch.cat([a.detach().double().cpu() for a in alphas])
    width = torch.cat(
        [torch.full((len(a),), float(w), dtype=torch.float64) for a, w in zip(alphas, widths, strict=True)]
    )

    def wanted(shift: float) -> torch.Tensor:
        return (alpha + shift).clamp(0, 1) * width

    low, high = -1.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if wanted(middle).floor().sum() <= budget else (low, middle)
    exact = wanted(low)
    counts = exact.floor()
    missing = budget - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    assert int(counts.sum()) == budget, (int(counts.sum()), budget)
    return [part.long() for part in torch.split(counts, [len(a) for a in alphas])]
