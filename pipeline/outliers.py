"""How many weights of a block stand out: what OWL's allocation goes by.

Yin et al. (2310.05175), equation 1: of all scores `A_ij = |W_ij| * ||X_j||_2` of a block's prunable weights, those
above `threshold` times their mean. The inputs X are those of the dense model.
"""

from collections.abc import Iterator, Sequence

import torch

from pipeline.allocation import Outliers
from pipeline.methods.wanda import input_norms, wanda_scores
from pipeline.sparsity import row_slabs
from pipeline.statistics import ColumnSquares, Statistic
from pipeline.survey import SurveyedBlock

Scored = tuple[torch.Tensor, torch.Tensor]
"""weight_OD of a linear, and norm_D (float32) of its input features."""


class OutlierCounter:
    """Counts the outliers of every block that a survey passes."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self.found: list[Outliers] = []
        """In the order of the blocks."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Column squares: the input norms."""
        return (ColumnSquares,)

    def see(self, index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
        """Ignore the hidden states: only the linears' inputs count."""

    def judge(self, block: SurveyedBlock) -> None:
        """Count the outliers among the weights of all linears."""
        linears = [
            (weight_OD, input_norms(block.gathered(name).of(ColumnSquares)))
            for name, weight_OD in block.weights.items()
        ]
        self.found.append(count_outliers(linears, self._threshold))


def count_outliers(linears: Sequence[Scored], threshold: float) -> Outliers:
    """Count the scores above `threshold` times the mean of all of them, in two passes over slabs of rows."""
    num_weights = sum(weight_OD.numel() for weight_OD, _ in linears)
    total = sum(score.double().sum().item() for score in _scores(linears))
    limit = threshold * total / num_weights
    num_outliers = sum(int((score > limit).count_nonzero()) for score in _scores(linears))
    return Outliers(num_outliers=num_outliers, num_weights=num_weights)


def _scores(linears: Sequence[Scored]) -> Iterator[torch.Tensor]:
    """Yield the scores of all linears, a slab of rows at a time."""
    for weight_OD, norm_D in linears:
        for rows in row_slabs(*weight_OD.shape):
            yield wanda_scores(weight_OD[rows], norm_D)
