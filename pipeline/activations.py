"""Hidden states of all calibration sequences at one boundary between blocks, wherever the plan keeps them."""

from collections.abc import Iterator, Sequence
from threading import Condition
from typing import Protocol, Self

import torch

from pipeline.budget import Budget
from pipeline.errors import NumericsError
from pipeline.memory_config import Tier
from pipeline.numerics import all_finite
from pipeline.paging.disk_region import DiskRegion
from pipeline.paging.pager import Pager
from pipeline.paging.region import MemoryRegion, Region
from pipeline.paging.spool import Spool
from pipeline.stream_names import StreamName


class Boundary:
    """One hidden_NTD (N sequences, T tokens, D features) in a region, read and written batch by batch."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, T, D."""
        return self.region.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.region.dtype

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return self.region.shape[0]

    @property
    def has_begun(self) -> bool:
        """Whether the first sequence is here."""
        return True

    def batches(self, size: int) -> Iterator[slice]:
        """Split the sequences into consecutive batches of at most `size`."""
        return batches(self.num_sequences, size)

    def expect(self, batches: Sequence[slice]) -> None:
        """Announce the coming reads, in their order, so that they can be read ahead."""
        self.region.expect(batches)

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences on a device; it is not to be changed in place.

        It may be a view of what is stored here, good until these sequences are written again. Raises StorageError.
        """
        return self.region.read(sequences, device)

    def stream(
        self, size: int, device: torch.device, num_sequences: int | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Read the first sequences, or all, in batches of at most `size`, each ahead of its turn; yield them in order.

        A batch may be written once it is yielded. Before all are yielded, another `expect` or `stream` would only
        slow this one down.
        """
        parts = list(batches(self.num_sequences if num_sequences is None else num_sequences, size))
        self.expect(parts)
        for sequences in parts:
            yield sequences, self.read(sequences, device)

    def write(self, sequences: slice, hidden_BTD: torch.Tensor, where: str) -> None:
        """Store hidden_BTD; raises StorageError, and NumericsError naming `where` when it holds NaN or Inf."""
        require_finite(hidden_BTD, where)
        self.region.write(sequences, hidden_BTD)

    def close(self) -> None:
        """Give back what it holds; raises StorageError when a write failed and nobody has been told."""
        self.region.close()


class ArrivingBoundary(Boundary):
    """A boundary that another stage fills, batch by batch and in any order, while it is read here.

    Who reads a sequence that has not arrived waits for it: so the first block is collected as fast as batches come.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._missing = set(range(region.shape[0]))
        self._arrived = Condition()
        self._failure: BaseException | None = None
        self._closed = False

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

        By then it may have been replaced by the outputs of this stage's own blocks. Nor is what comes after `close`:
        this stage has failed, and who sends is not to blame. Raises StorageError, here and in who waits: what could
        not be stored is not sent a second time.
        """
        wanted = set(range(sequences.start, sequences.stop))
        with self._arrived:
            if not self._closed and wanted <= self._missing:
                try:
                    self.region.write(sequences, hidden_BTD)
                    self._missing -= wanted
                except BaseException as error:
                    self._failure = error
                    raise
                finally:
                    self._arrived.notify_all()

    def wait(self) -> None:
        """Return once every sequence has arrived; raises the StorageError of one that could not be stored."""
        self._wait_for(set(range(self.num_sequences)))

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences on a device, once they are there; as `Boundary.read` does."""
        self._wait_for(set(range(*sequences.indices(self.num_sequences))))
        return super().read(sequences, device)

    def close(self) -> None:
        """Give back what it holds, as `Boundary.close` does; what arrives from now on is ignored."""
        with self._arrived:
            self._closed = True
        super().close()

    def _wait_for(self, wanted: set[int]) -> None:
        with self._arrived:
            self._arrived.wait_for(lambda: self._failure is not None or wanted.isdisjoint(self._missing))
            if self._failure is not None:
                raise self._failure


class Store:
    """Makes boundaries on one tier, out of one budget."""

    def __init__(
        self,
        tier: Tier,
        device: torch.device,
        budget: Budget,
        spool: Spool | None = None,
        pager: Pager | None = None,
        *,
        batch: int = 1,
        depth: int = 2,
    ) -> None:
        """`device`: where blocks run; `spool` and `pager`: for the disk.

        `batch`: sequences moved to it at once; `depth`: batches of each boundary on their way to it, and from it.
        """
        self._tier: Tier = tier
        self._device = device
        self._budget = budget
        self._spool, self._pager = spool, pager
        self._batch, self._depth = batch, depth

    def boundary(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Boundary:
        """Make a boundary for hidden_NTD of a shape, to be closed by the caller; no two may have the same name.

        Raises BudgetExceeded, and StorageError when the disk has no room.
        """
        return Boundary(self._region(name, shape, dtype))

    def arriving(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> ArrivingBoundary:
        """Make a boundary that another stage fills, as `boundary` does."""
        return ArrivingBoundary(self._region(name, shape, dtype))

    def copy(self, name: str, other: Boundary) -> Boundary:
        """Make an independent boundary with the hidden states of another, as `boundary` does."""
        copy = self.boundary(name, other.shape, other.dtype)
        through = self._device if self._tier == "device" else torch.device("cpu")
        try:
            for sequences, hidden_BTD in other.stream(self._batch, through):
                copy.region.write(sequences, hidden_BTD)
        except BaseException:
            copy.close()
            raise
        return copy

    def _region(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Region:
        if self._tier != "disk":
            return MemoryRegion(name, shape, dtype, tier=self._tier, device=self._device, budget=self._budget)
        assert self._spool is not None, "the disk tier needs a spool and a pager"
        assert self._pager is not None, "the disk tier needs a spool and a pager"
        return DiskRegion(
            name, shape, dtype,
            spool=self._spool, pager=self._pager, budget=self._budget, slot_sequences=self._batch,
            depth=self._depth,
        )  # fmt: skip


def in_memory() -> Store:
    """Return a store in plain host memory without ceilings."""
    return Store("host", torch.device("cpu"), Budget())


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
