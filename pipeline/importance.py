"""How much each block turns the hidden states that pass it: what structured pruning chooses whole blocks by."""

import torch

from pipeline.methods.structured.depth import turned
from pipeline.statistics import Statistic
from pipeline.survey import SurveyedBlock


class ImportanceMeter:
    """Averages `1 - cos` of the tokens before and after every block that a survey passes.

    num_skipped: tokens at the start of each sequence that do not count; the first one is often unlike all others.
    """

    def __init__(self, num_skipped: int = 0) -> None:
        self._num_skipped = num_skipped
        self._sum: torch.Tensor | None = None
        self._count = 0
        self.found: list[float] = []
        """In the order of the blocks."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """None: it looks at hidden states alone."""
        return ()

    def see(self, index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
        """Add the tokens of a batch, in float64."""
        turned_BT = turned(entering_BTD[:, self._num_skipped :], leaving_BTD[:, self._num_skipped :])
        total = turned_BT.double().sum()
        self._sum = total if self._sum is None else self._sum + total
        self._count += turned_BT.numel()

    def judge(self, block: SurveyedBlock) -> None:
        """Note the mean over all tokens."""
        assert self._sum is not None, "a block is seen before it is judged"
        self.found.append(self._sum.item() / self._count)
        self._sum, self._count = None, 0
