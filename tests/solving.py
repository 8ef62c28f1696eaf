"""A linear step on one linear, for tests."""

import torch

from pipeline.methods.step import LinearStep, LinearView, PrunedLinear
from pipeline.sparsity import Sparsity
from pipeline.statistics import Gathered, Statistic


def solve(
    step: LinearStep,
    statistics: Statistic | list[Statistic],
    weight_OD: torch.Tensor,
    sparsity: Sparsity,
    keep_OD: torch.Tensor | None = None,
    updated_OD: torch.Tensor | None = None,
) -> PrunedLinear:
    """What a step makes of a matrix, from these statistics of its inputs."""
    gathered = Gathered(statistics if isinstance(statistics, list) else [statistics])
    view = LinearView(dense_OD=weight_OD, sparsity=sparsity, keep_OD=keep_OD, updated_OD=updated_OD)
    return step.solver(gathered)(view)
