"""Fake quantisation as OmniQuant writes it, in float64, a grid at a time: what `pipeline` is held against.

Shapes: O = out features (rows), D = in features (columns), Q = grids of a row.
"""

import torch


def straight_through_round(x: torch.Tensor) -> torch.Tensor:
    """Return x rounded, with the gradient of x itself."""
    return x + (x.round() - x).detach()


def quantised(weight_OD: torch.Tensor, strength_2OQ: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Return W on its grids (OmniQuant's learnable clipping), one grid at a time, differentiable in the strengths.

    h = (g1 max W - g0 min W) / (2^b - 1), z = round(-g0 min W / h), Wq = h (clamp(round(W / h) + z) - z), with a range
    that holds 0, h rounded to bfloat16, and all roundings straight through.
    """
    weight_OD, top = weight_OD.double(), 2**bits - 1
    rows = []
    for r, row_D in enumerate(weight_OD):
        parts = []
        for q, part in enumerate(torch.split(row_D, group or len(row_D))):
            low, high = strength_2OQ[0, r, q] * part.min().clamp(max=0), strength_2OQ[1, r, q] * part.max().clamp(min=0)
            step = (high - low) / top
            step = step + (step.bfloat16().double() - step).detach()
            exact = -low / step
            zero = exact + (exact.round().clamp(0, top) - exact).detach()
            level = (straight_through_round(part / step) + zero).clamp(0, top)
            parts.append(step * (level - zero))
        rows.append(torch.cat(parts))
    return torch.stack(rows)
