"""Methods that fit the kept weights, on one linear, for tests."""

import torch

from pipeline.methods.least_squares import FittingStep
from pipeline.methods.step import PrunedLinear
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import Gram
from tests.solving import solve

HALF = Unstructured(ratio=0.5)
FOUR_OF_EIGHT = SemiStructured(keep=4, group=8)
SPARSITIES = [HALF, Unstructured(ratio=0.7), SemiStructured(keep=2, group=4), FOUR_OF_EIGHT]


def prune(
    step: FittingStep, weight_OD: torch.Tensor, gram: Gram, sparsity: Sparsity, keep_OD: torch.Tensor | None = None
) -> tuple[torch.Tensor, PrunedLinear]:
    """The new weights, zero where pruned, and all of the result."""
    pruned = solve(step, gram, weight_OD, sparsity, keep_OD)
    assert pruned.weight_OD is not None
    assert not pruned.weight_OD[~pruned.keep_OD].any()
    return pruned.weight_OD, pruned
