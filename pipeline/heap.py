"""Freed host memory goes back to the system, so that what a run holds is what it uses.

glibc keeps freed tensors of up to 32 MB in its heaps, in pieces that the next block's tensors often do not fit:
resident memory would grow with every block, as if the model were kept.
"""

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return trim


def give_back_freed_memory() -> None:
    """Return the heaps' free pages to the system; does nothing where the C library is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
