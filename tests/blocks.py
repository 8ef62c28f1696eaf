"""What every small block has that stands in for a `BlockView` in tests of block steps."""

from collections.abc import Mapping, Sequence

import torch

from pipeline.methods.step import NOTHING, MiniBatch, PrunedLinear
from tests.replicas import ThreadPeer


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

    @property
    def num_sequences(self) -> int:
        return len(self.hidden_BTD)

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nobody else has sequences."""

    def from_the_first(self, tensor: torch.Tensor) -> None:
        """There is no other."""


class SharedBlock(SmallBlock):
    """One of several replicas, each with its own part of the sequences; `share_out` says which."""

    def share_out(self, peer: ThreadPeer, shares: Sequence[slice]) -> None:
        self.hidden_BTD = self.hidden_BTD[shares[peer.rank]]
        self._peer, self._counts = peer, [share.stop - share.start for share in shares]
        self.num_replicas = peer.size

    def num_mini_batches(self, size: int) -> int:
        return -(-max(self._counts) // size)

    def mini_batches(self, size: int, order: Sequence[int] | None = None) -> list[MiniBatch]:
        updates = []
        for number in range(self.num_mini_batches(size)) if order is None else order:
            parts = [min(max(count - number * size, 0), size) for count in self._counts]
            here = parts[self._peer.rank]
            updates.append(MiniBatch(here=slice(number * size, number * size + here), weight=here / sum(parts)))
        return updates

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        self._peer.sum(tensors)

    def from_the_first(self, tensor: torch.Tensor) -> None:
        self._peer.broadcast(tensor, 0)
