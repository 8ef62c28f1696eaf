"""Where the hidden states of one boundary are kept: what every such place can do, and the ones that are memory.

A region holds hidden_NTD (N sequences, T tokens, D features), allocated once and used again for every block.
`disk_region` has the one that is a file.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from pipeline.budget import Budget
from pipeline.paging.pager import host_buffer


class Region(Protocol):
    """One preallocated hidden_NTD, wherever it is kept; one thread may write while another reads."""

    shape: tuple[int, int, int]
    """N, T, D."""

    dtype: torch.dtype

    bytes_read: int
    """Bytes of hidden states taken out so far; of a file: read from it, even if nobody took them in the end."""

    bytes_written: int
    """Bytes of hidden states put in so far."""

    waited: float
    """Seconds that callers have spent waiting for a disk."""

    def expect(self, batches: Sequence[slice]) -> None:
        """Announce the coming reads, in their order; what was announced before is forgotten."""

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences, all written before, on a device. It is not to be changed in place."""

    def write(self, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Copy hidden_BTD in; a later read sees it, and the caller may reuse it at once."""

    def close(self) -> None:
        """Give back all that is held; does nothing the second time."""


class MemoryRegion:
    """Hidden states in one tensor: on the device, in page-locked or in plain host memory."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        tier: Literal["device", "pinned", "host"],
        device: torch.device,
        budget: Budget,
    ) -> None:
        """Take the bytes from the budget; raises BudgetExceeded. `device`: where blocks run.

        Where that is no CUDA device, `pinned` is `host`.
        """
        self.shape, self.dtype = shape, dtype
        self.bytes_read = self.bytes_written = 0
        self.waited = 0.0
        self._is_pinned = tier == "pinned" and device.type == "cuda"
        self._copied: torch.cuda.Event | None = None
        num_bytes = math.prod(shape) * dtype.itemsize
        self._lease = budget.take("device" if tier == "device" else "host", num_bytes, f"the {name} boundary")
        if tier == "device":
            self._hidden_NTD = torch.empty(shape, dtype=dtype, device=device)
        else:
            self._hidden_NTD = host_buffer(num_bytes, pinned=self._is_pinned)[:num_bytes].view(dtype).view(shape)

    def expect(self, batches: Sequence[slice]) -> None:
        """Do nothing: all is at hand."""

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences on a device.

        Where they are on that device already this is a view: not to be changed, and good until they are written again.
        """
        self._settle(device)
        own_BTD = self._hidden_NTD[sequences]
        self.bytes_read += own_BTD.nbytes
        hidden_BTD = own_BTD.to(device, non_blocking=self._is_pinned)
        self._mark(device)
        return hidden_BTD

    def write(self, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Copy hidden_BTD in."""
        self._settle(hidden_BTD.device)
        own_BTD = self._hidden_NTD[sequences]
        self.bytes_written += own_BTD.nbytes
        own_BTD.copy_(hidden_BTD, non_blocking=self._is_pinned)
        self._mark(hidden_BTD.device)

    def close(self) -> None:
        """Give the memory back."""
        self._settle(torch.device("cpu"))
        self._hidden_NTD = torch.empty(0)
        self._lease.give_back()

    def _settle(self, device: torch.device) -> None:
        """Before the processor touches the tensor, wait for the device's copies; its own follow each other anyway."""
        if self._copied is not None and device.type == "cpu":
            self._copied.synchronize()

    def _mark(self, device: torch.device) -> None:
        if self._is_pinned:
            self._copied = copies_enqueued(device) or self._copied


def copies_enqueued(device: torch.device) -> torch.cuda.Event | None:
    """Return an event of what a CUDA device has been told so far; None for others, which are done when they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
