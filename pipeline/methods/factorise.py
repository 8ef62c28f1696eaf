"""Factorising a Gram matrix that rounding or few tokens have left singular: the damping rises until it succeeds.

Shapes: D = in features.
"""

from collections.abc import Callable, Iterator

import torch

from pipeline.errors import NumericsError
from pipeline.numerics import all_finite

DAMPING_LIMIT = 1.0
"""Above this multiple of the mean diagonal the damped matrix says little of the data: give up instead."""


def rising(damping: float) -> Iterator[float]:
    """Yield a damping, ten times it, and so on up to the limit itself."""
    while damping < DAMPING_LIMIT:
        yield damping
        damping *= 10
    yield DAMPING_LIMIT


def with_damping_enough(
    factorise: Callable[[float], torch.Tensor | None], damping: float, diagonal_D: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return what `factorise` makes with the first damping that suffices, and that damping.

    factorise: given a multiple of the mean diagonal, the factor [D, D], or None where the matrix with that much added
    is not positive definite. Raises NumericsError when no damping up to DAMPING_LIMIT suffices.
    """
    for used in rising(damping):
        factor_DD = factorise(used)
        if factor_DD is not None and all_finite(factor_DD):
            return factor_DD, used
    raise NumericsError(
        f"the Gram matrix of {len(diagonal_D)} input features could not be factorised with any damping from "
        f"{damping:g} to {DAMPING_LIMIT:g} of its mean diagonal {diagonal_D.mean().item():.3g}; use more calibration "
        "tokens, or a method without a factorisation (wanda, besa)"
    )
