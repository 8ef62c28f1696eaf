"""The replicas of one stage, seen from one of them: whom to sum statistics and gradients with.

Each replica holds some of the calibration sequences. What it knows of them is summed over all replicas in rank
order, so that the sum has the same bits on every one of them and in every run with as many replicas.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class Peers(Protocol):
    """This replica (its `rank`) among all of its stage (their number, `size`)."""

    @property
    def rank(self) -> int:
        """0 for the replica that writes the shards."""

    @property
    def size(self) -> int:
        """Number of replicas."""

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all replicas, added in rank order."""

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace a contiguous tensor, in place, by the one that replica `owner` has."""

    def agree(self, numbers: torch.Tensor, what: str) -> None:
        """Raise NumericsError, naming `what`, unless all replicas hold the same int64 numbers."""


class Alone:
    """A stage of one replica: there is nobody to ask."""

    rank = 0
    size = 1

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leave the tensors as they are: they are the sums."""

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Leave the tensor as it is: it is the owner's."""

    def agree(self, numbers: torch.Tensor, what: str) -> None:
        """Agree."""
