"""Hidden states of all calibration sequences at one boundary between blocks, kept in host memory."""

from collections.abc import Iterator
from threading import Condition
from typing import Literal, Protocol

import torch

from pipeline.errors import NumericsError
from pipeline.numerics import all_finite

StreamName = Literal["pruned", "dense"]


class Boundary:
    """One preallocated hidden_NTD (N sequences, T tokens, D features), read and written batch by batch."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.hidden_NTD = torch.empty(shape, dtype=dtype)

    @classmethod
    def copy_of(cls, other: "Boundary") -> "Boundary":
        """Return an independent boundary with the same hidden states."""
        copy = Boundary(other.shape, other.hidden_NTD.dtype)
        copy.hidden_NTD.copy_(other.hidden_NTD)
        return copy

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, T, D."""
        num_sequences, num_tokens, num_features = self.hidden_NTD.shape
        return num_sequences, num_tokens, num_features

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return self.hidden_NTD.shape[0]

    @property
    def has_begun(self) -> bool:
        """Whether the first sequence is here."""
        return True

    def batches(self, size: int) -> Iterator[slice]:
        """Split the sequences into consecutive batches of at most `size`."""
        return batches(self.num_sequences, size)

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences on a device."""
        return self.hidden_NTD[sequences].to(device)

    def write(self, sequences: slice, hidden_BTD: torch.Tensor, where: str) -> None:
        """Store hidden_BTD; raises NumericsError naming `where` when it holds NaN or Inf."""
        require_finite(hidden_BTD, where)
        self.hidden_NTD[sequences].copy_(hidden_BTD)


class ArrivingBoundary(Boundary):
    """A boundary that another stage fills, batch by batch and in any order, while it is read here.

    Who reads a sequence that has not arrived waits for it: so the first block is collected as fast as batches come.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._missing = set(range(shape[0]))
        self._arrived = Condition()

    @property
    def has_begun(self) -> bool:
        """Whether the first sequence has arrived."""
        return 0 not in self._missing

    @property
    def complete(self) -> bool:
        """Whether every sequence has arrived."""
        return not self._missing

    def put(self, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Take what has arrived from another thread; what is here already is not taken a second time.

        By then it may have been replaced by the outputs of this stage's own blocks.
        """
        wanted = set(range(sequences.start, sequences.stop))
        with self._arrived:
            if wanted <= self._missing:
                self.hidden_NTD[sequences].copy_(hidden_BTD)
                self._missing -= wanted
                self._arrived.notify_all()

    def wait(self) -> None:
        """Return once every sequence has arrived."""
        with self._arrived:
            self._arrived.wait_for(lambda: not self._missing)

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences on a device, once they are there."""
        if self._missing:
            wanted = set(range(*sequences.indices(self.num_sequences)))
            with self._arrived:
                self._arrived.wait_for(lambda: not wanted & self._missing)
        return super().read(sequences, device)


class Outlet(Protocol):
    """Where a stage's hidden states go on to."""

    def send(self, stream: StreamName, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Hand one batch on; waits while too many are under way."""


def require_finite(hidden_BTD: torch.Tensor, where: str) -> None:
    """Raise NumericsError naming `where` when hidden states hold NaN or Inf."""
    if not all_finite(hidden_BTD):
        raise NumericsError(
            f"hidden states after {where} hold NaN or Inf; they cannot go on to the next block. Compute in "
            "float32 (`compute.dtype: float32`), or check the model with `secateur evaluate`"
        )


def batches(num_sequences: int, size: int) -> Iterator[slice]:
    """Split a number of sequences into consecutive slices of at most `size`."""
    for start in range(0, num_sequences, size):
        yield slice(start, min(start + size, num_sequences))
