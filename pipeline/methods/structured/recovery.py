"""What makes up for units that are gone, in closed form and without changing the architecture.

    mask    each kept unit is rescaled, so that the output is again as the dense one: folded into the weights
    lstsq   all kept weights are solved for anew: W_S + W_P C_PS (C_SS + ridge I)^-1, with C the Gram matrix; the ridge
            pulls towards the dense W_S (FASP's recovery, with a ridge that holds off over-fitting)
    bias    what the gone units carried on average: W_P mean(x_P) (FLAP)
    none

Whatever recovery it is, it is held against sequences that it was not fitted to, and given up where it does no good.
Solved in float64. Shapes: O = out features, D = in features, K = those that are kept, U = units.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from pipeline.methods.factorise import factor_in_place, solve_factored, with_damping_enough
from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.numerics import all_finite

LARGEST_FACTOR = 10.0
"""A unit is never rescaled by more than this, either way (the bound of Kwon et al.)."""

DAMPINGS = (0.01, 0.1, 0.5, 1.0)
"""Ridges to choose from, on sequences held out."""

AnyRecovery = TypeVar("AnyRecovery")


def is_sound(mask_U: torch.Tensor) -> bool:
    """Tell whether every entry of a mask is finite and no larger than LARGEST_FACTOR, either way."""
    return all_finite(mask_U) and mask_U.abs().max().item() <= LARGEST_FACTOR


def best_mask(keep_U: torch.Tensor, candidates: Iterable[torch.Tensor], held_out: MaskProblem) -> torch.Tensor:
    """Return the sound mask that errs least on tokens held out; ones on the kept units, where none errs less.

    held_out: the problem with the Gram matrix of those tokens.
    """
    sound = [mask_U for mask_U in candidates if is_sound(mask_U)]
    return best_of([keep_U.double(), *sound], held_out.error)


def best_of(candidates: Iterable[AnyRecovery], error: Callable[[AnyRecovery], float]) -> AnyRecovery:
    """Return the candidate with the smallest error; the first of equal ones."""
    return min(candidates, key=error)


def folded(weight_OD: torch.Tensor, mask_U: torch.Tensor) -> torch.Tensor:
    """Return weights whose columns are rescaled by their unit's entry of the mask, float64 [O, D]."""
    return weight_OD.double() * mask_U.repeat_interleave(weight_OD.shape[1] // len(mask_U))


def solved(
    weight_OD: torch.Tensor, gram_DD: torch.Tensor, keep_D: torch.Tensor, damping: float
) -> tuple[torch.Tensor, float]:
    """Return the kept columns of the weights that bring the outputs closest to the dense ones, float64 [O, K].

    With them comes the ridge that was used, as a multiple of the mean power of the kept features: `damping`, or more
    where rounding made that necessary. Raises NumericsError where nothing helps.
    """
    kept, gone = keep_D.nonzero()[:, 0], (~keep_D).nonzero()[:, 0]
    power_K = gram_DD.diagonal()[kept].double()
    mean = power_K.mean().item() or 1.0
    missing_OK = weight_OD[:, gone].double() @ gram_DD[gone[:, None], kept].double()
    lower_KK, used = with_damping_enough(
        lambda multiple: factor_in_place(gram_DD[kept[:, None], kept].double(), multiple * mean), damping, power_K
    )
    return weight_OD[:, kept].double() + solve_factored(lower_KK, missing_OK.T).T, used


def bias_of(weight_OD: torch.Tensor, keep_D: torch.Tensor, mean_D: torch.Tensor) -> torch.Tensor:
    """Return what features that are gone carried to the output on average, float64 [O]."""
    return weight_OD[:, ~keep_D].double() @ mean_D[~keep_D].double()


def output_error(dense_OD: torch.Tensor, kept_OK: torch.Tensor, keep_D: torch.Tensor, gram_DD: torch.Tensor) -> float:
    """Return the squared error of the output with only these columns, relative to the squared dense output.

    With the Gram matrix of other tokens this is the error on those; 0 where there is no output.
    """
    dense_OD, gram_DD = dense_OD.double(), gram_DD.double()
    missing_OD = dense_OD.clone()
    missing_OD[:, keep_D] -= kept_OK.double()
    power = (dense_OD @ gram_DD * dense_OD).sum().item()
    return (missing_OD @ gram_DD * missing_OD).sum().item() / power if power > 0 else 0.0
