"""What every small block has that stands in for a `BlockView` in tests of block steps."""

from collections.abc import Mapping, Sequence

import torch

from pipeline.methods.step import NOTHING, MiniBatch, PrunedLinear


class SmallBlock:
    """One replica, with all sequences in `hidden_BTD`; subclasses have the weights, and run them."""

    num_replicas = 1
    others: Mapping[str, torch.Tensor] = NOTHING
    tuned: Mapping[str, torch.Tensor] = NOTHING
    so_far: Mapping[str, PrunedLinear] = {}
    hidden_BTD: torch.Tensor

    def num_mini_batches(self, size: int) -> int:
        return -(-len(self.hidden_BTD) // size)

    def mini_batches(self, size: int, order: Sequence[int] | None = None) -> list[MiniBatch]:
        numbers = range(self.num_mini_batches(size)) if order is None else order
        return [MiniBatch(here=slice(n * size, (n + 1) * size), weight=1.0) for n in numbers]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nobody else has sequences."""
