"""Metrics that are a score alone, of neurons and of units of several features."""

import pytest
import torch

from pipeline.methods.structured.baselines import flap_of_units, wanda_sp
from pipeline.methods.structured.scores import SCORED_BY, score_of
from pipeline.sequence_norms import SequenceNorms
from pipeline.statistics import ColumnSquares, Gathered, Moments
from tests.correlated import inputs, normal


def gathered(x_TD: torch.Tensor) -> Gathered:
    statistics = [kind.empty(12, x_TD.device) for kind in (ColumnSquares, Moments, SequenceNorms)]
    for statistic in statistics:
        statistic.update(x_TD)
    return Gathered(statistics)


@pytest.mark.parametrize("unit_size", [1, 3])
def test_each_score_is_its_formulas(unit_size: int) -> None:
    weight_OD, x_TD = normal(5, 12), inputs(12, 30)
    known = gathered(x_TD)
    squares_D, variance_D = known.of(ColumnSquares).squares_D, known.of(Moments).variance_D
    norms_D = x_TD.double().norm(dim=0)  # one sequence
    wanted = {
        "wanda_sp": wanda_sp(weight_OD, squares_D, unit_size),
        "flap": flap_of_units(weight_OD, variance_D, unit_size),
        "two_ssp": torch.stack([norms_D[start : start + unit_size].sum() for start in range(0, 12, unit_size)]),
    }
    assert wanted.keys() == SCORED_BY.keys()
    for metric, score_U in wanted.items():
        torch.testing.assert_close(score_of(metric, weight_OD, known.holding([SCORED_BY[metric]]), unit_size), score_U)
