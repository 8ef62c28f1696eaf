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


def factor_in_place(matrix_DD: torch.Tensor, added: float) -> torch.Tensor | None:
    """Turn a symmetric matrix, with `added` on its diagonal, into its lower factor; None where there is none.

    Nothing of its size is made beside it; where there is no factor, the matrix is lost too.
    """
    matrix_DD.diagonal().add_(added)
    by_columns_DD = matrix_DD.mT  # itself, being symmetric, but laid out as LAPACK wants it: nothing is copied
    failed = torch.empty((), dtype=torch.int32, device=matrix_DD.device)
    torch.linalg.cholesky_ex(by_columns_DD, out=(by_columns_DD, failed))
    return None if failed else by_columns_DD


def solve_factored(lower_DD: torch.Tensor, right_DN: torch.Tensor) -> torch.Tensor:
    """Return (L L^T)^-1 times some columns, without a copy of L (`cholesky_solve` makes one)."""
    half_DN = torch.linalg.solve_triangular(lower_DD, right_DN, upper=False)
    whole_DN: torch.Tensor = torch.linalg.solve_triangular(lower_DD.mT, half_DN, upper=True)
    return whole_DN
