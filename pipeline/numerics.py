"""Small numerical helpers that every floor may use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import NumericsError


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether no entry is NaN or Inf, without a temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    if tensor.ndim == 2 and tensor.mT.is_contiguous():
        tensor = tensor.mT  # a factor of LAPACK lies column by column, and `aminmax` copies what is not contiguous
    low, high = tensor.aminmax()  # NaN propagates into both
    return bool(low.isfinite() & high.isfinite())


@contextmanager
def naming_block(index: int) -> Iterator[None]:
    """Put a block's number before the message of a NumericsError that knows only what is inside the block."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"block {index}: {error.message}") from error
