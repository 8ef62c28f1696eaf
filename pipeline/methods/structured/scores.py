"""Metrics that judge each neuron, or head, by a score of its own, and the statistic that each of them needs."""

import torch

from pipeline.methods.structured.baselines import flap_of_units, wanda_sp
from pipeline.sequence_norms import SequenceNorms
from pipeline.statistics import ColumnSquares, Gathered, Moments, Statistic

SCORED_BY: dict[str, type[Statistic]] = {"wanda_sp": ColumnSquares, "flap": Moments, "two_ssp": SequenceNorms}
"""What the metrics that are a score alone need; the others need the Gram matrix."""


def score_of(metric: str, weight_OD: torch.Tensor, gathered: Gathered, unit_size: int = 1) -> torch.Tensor:
    """Return what such a metric says of every unit, float64 [U]: the lowest go first.

    weight_OD: of the linear that reads the units; unit_size: features of a unit. 2SSP knows no heads: here a head's
    score is the sum of its features'.
    """
    if metric == "flap":
        return flap_of_units(weight_OD, gathered.of(Moments).variance_D, unit_size)
    if metric == "two_ssp":
        return gathered.of(SequenceNorms).mean_D.view(-1, unit_size).sum(dim=1)
    return wanda_sp(weight_OD, gathered.of(ColumnSquares).squares_D, unit_size)
