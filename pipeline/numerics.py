"""Small numerical helpers that every floor may use."""

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether no entry is NaN or Inf, without a temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()  # NaN propagates into both
    return bool(low.isfinite() & high.isfinite())
