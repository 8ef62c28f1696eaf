"""Hidden states in a file of the spool: read ahead in the order announced, written behind, checked when they return.

Each of N sequences lies at a multiple of the disk's alignment, so that moving one never touches another.
"""

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import torch

from pipeline.budget import Budget
from pipeline.errors import CheckpointError, StorageError
from pipeline.paging.pager import Pager, aligned
from pipeline.paging.region import copies_enqueued
from pipeline.paging.spool import Spool

DEPTH = 2
"""Slots for reading, and as many for writing: one on its way while the other is filled or emptied."""


class DiskRegion:
    """A region in a spool file; see `Region` for what its methods promise.

    It moves *pieces*, what one slot holds of consecutive sequences. Each transfer is a job of a small pool: it waits
    for the jobs it must not overtake, all handed in before it and begun before it, so no circle of waiting can form;
    it moves the bytes, and computes or compares a crc32 of each sequence.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        spool: Spool,
        pager: Pager,
        budget: Budget,
        slot_sequences: int,
        depth: int = DEPTH,
    ) -> None:
        """Make the file, and `depth` slots each way of `slot_sequences` sequences.

        Raises BudgetExceeded, and StorageError where the disk has no room.
        """
        self.shape, self.dtype = shape, dtype
        self.bytes_read = self.bytes_written = 0
        self.waited = 0.0
        self._pager = pager
        self._sequence_bytes = shape[1] * shape[2] * dtype.itemsize
        self._stride = aligned(self._sequence_bytes)
        self._slot_sequences = min(slot_sequences, shape[0])
        self._checksums: dict[int, int] = {}
        self._unwritten = set(range(shape[0]))
        self._failure: BaseException | None = None
        self._failure_told = False
        self._lock = threading.RLock()
        with ExitStack() as held:
            file_bytes, slot_bytes = shape[0] * self._stride, self._slot_sequences * self._stride
            held.enter_context(budget.take("spool", file_bytes, f"the {name} boundary"))
            self._path = spool.create(name, file_bytes)
            held.callback(spool.remove, self._path)
            held.enter_context(
                budget.take("host", 2 * depth * slot_bytes, f"the transfer buffer of the {name} boundary")
            )
            self._idle, self._writers = (deque(self._make_slot(slot_bytes, held) for _ in range(depth)) for _ in "rw")
            self._pool = ThreadPoolExecutor(2 * depth, thread_name_prefix=f"spool-{name}")
            held.callback(self._pool.shutdown)
            self._held = held.pop_all()
        self._expected = deque[range]()
        self._ahead = deque[_Slot]()  # hold, or are getting, what is expected next; idle: the other slots for reading

    def expect(self, batches: Sequence[slice]) -> None:
        """Announce the coming reads; as many as there are slots are begun now, up to what is not yet written."""
        with self._lock:
            while self._ahead:
                self._recall_last()
            self._expected = deque(piece for batch in batches for piece in self._pieces(batch))
            self._read_ahead()

    def read(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """Return hidden_BTD of some sequences, a tensor of its own, whether or not it was expected.

        Raises StorageError when they cannot be read or are not what was written, or when a write has failed.
        """
        pieces = self._pieces(sequences)
        first, last = pieces[0].start, pieces[-1].stop
        hidden_BTD = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype, device=device)
        with self._lock:
            self._raise_failure()
            assert self._unwritten.isdisjoint(range(first, last)), f"{self._path}: {sequences} read, not all written"
            for piece in pieces:
                self._read_piece(piece, hidden_BTD[piece.start - first : piece.stop - first])
        return hidden_BTD

    def write(self, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Copy hidden_BTD into slots and begin to write them, waiting where all are on their way.

        Raises StorageError when an earlier write has failed.
        """
        pieces = self._pieces(sequences)
        first, last = pieces[0].start, pieces[-1].stop
        assert hidden_BTD.shape == (last - first, *self.shape[1:]), f"{sequences} of {self.shape}: {hidden_BTD.shape}"
        with self._lock:
            self._raise_failure()
            for piece in pieces:
                self._write_piece(piece, hidden_BTD[piece.start - first : piece.stop - first])
            self._read_ahead()

    def flush(self) -> None:
        """Return once all that was written is in the file; raises StorageError when it cannot be."""
        with self._lock:
            for slot in self._writers:
                self._wait(slot)
            self._raise_failure()

    def close(self) -> None:
        """Wait for what is under way, give the slots back and remove the file.

        Raises StorageError when a write has failed and nobody has been told.
        """
        with self._lock:
            for slots in (self._idle, self._ahead, self._writers, self._expected):
                slots.clear()
            self._held.close()
            if not self._failure_told:
                self._raise_failure()

    def _make_slot(self, num_bytes: int, held: ExitStack) -> "_Slot":
        buffer = self._pager.buffer(num_bytes)
        held.callback(self._pager.drop_buffer, buffer)
        slot = _Slot(buffer.view(-1, self._stride), self.shape, self.dtype)
        held.callback(slot.settle)
        return slot

    def _pieces(self, sequences: slice) -> list[range]:
        numbers, size = range(self.shape[0])[sequences], self._slot_sequences
        assert len(numbers) > 0, sequences
        assert numbers.step == 1, sequences
        return [numbers[at : at + size] for at in range(0, len(numbers), size)]

    def _read_piece(self, piece: range, hidden_BTD: torch.Tensor) -> None:
        slot = self._reader_of(piece)
        try:
            self._wait(slot)
            self._raise_failure()
            slot.copy_to(hidden_BTD)
        finally:
            self._idle.append(slot)
        self._read_ahead()

    def _reader_of(self, piece: range) -> "_Slot":
        """Return the slot into which a piece has been read ahead, or else is read from now on."""
        if self._ahead and self._ahead[0].piece == piece:
            return self._ahead.popleft()
        if not self._ahead and self._expected and self._expected[0] == piece:
            self._expected.popleft()
        if not self._idle:
            self._recall_last()
        return self._begin_read(piece)

    def _read_ahead(self) -> None:
        while self._idle and self._expected and self._unwritten.isdisjoint(self._expected[0]):
            self._ahead.append(self._begin_read(self._expected.popleft()))

    def _recall_last(self) -> None:
        """Take back what was read ahead last: it is expected still, and will be read once more."""
        slot = self._ahead.pop()
        self._expected.appendleft(slot.piece)
        self._idle.append(slot)

    def _begin_read(self, piece: range) -> "_Slot":
        slot = self._idle.popleft()
        earlier = [slot.job, *_under_way(self._writers, piece)]
        slot.piece, slot.job = piece, self._pool.submit(self._load, slot, piece, earlier)
        self.bytes_read += len(piece) * self._sequence_bytes
        return slot

    def _write_piece(self, piece: range, hidden_BTD: torch.Tensor) -> None:
        while any(_overlap(slot.piece, piece) for slot in self._ahead):
            self._recall_last()
        slot = self._writers[0]
        self._wait(slot)
        self._raise_failure()
        slot.copy_from(hidden_BTD)
        self._writers.rotate(-1)
        earlier = _under_way(self._writers, piece)  # of reads, only some that were recalled; nobody looks at those
        slot.piece, slot.job = piece, self._pool.submit(self._store, slot, piece, earlier)
        self._unwritten.difference_update(piece)
        self.bytes_written += len(piece) * self._sequence_bytes

    def _load(self, slot: "_Slot", piece: range, earlier: Iterable["Future[None]"]) -> None:
        """Read a piece into its slot and compare its checksums; a job of the pool."""
        wait(earlier)
        if self._failure is not None:
            return  # who asked for this piece finds it
        slot.settle()
        try:
            self._pager.read(self._path, piece.start * self._stride, slot.bytes_of(piece)).wait()
        except CheckpointError as error:
            raise StorageError(f"hidden states are lost: {error.message}; {_WAY_OUT}") from error
        for sequence, checksum in zip(piece, slot.checksums(piece), strict=True):
            if checksum != self._checksums[sequence]:
                raise StorageError(
                    f"{self._path}: sequence {sequence} of the hidden states came back with crc32 {checksum:08x}, and "
                    f"was written with {self._checksums[sequence]:08x}: the disk is faulty, or something else changed "
                    f"the file; {_WAY_OUT}"
                )

    def _store(self, slot: "_Slot", piece: range, earlier: Iterable["Future[None]"]) -> None:
        """Write a piece from its slot and keep its checksums; a job of the pool, which leaves its failure behind."""
        wait(earlier)
        try:
            slot.settle()
            transfer = self._pager.write(self._path, piece.start * self._stride, slot.bytes_of(piece))
            self._checksums.update(zip(piece, slot.checksums(piece), strict=True))
            transfer.wait()
        except BaseException as error:
            self._failure = error

    def _wait(self, slot: "_Slot") -> None:
        started = time.perf_counter()
        try:
            slot.job.result()
        finally:
            self.waited += time.perf_counter() - started

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._failure_told = True
            raise self._failure


class _Slot:
    """A reused buffer of some sequences, and the job that last used it."""

    def __init__(self, buffer: torch.Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """`buffer`: uint8, one sequence and its padding a row; `shape` and `dtype`: of the region's hidden_NTD."""
        self._rows = buffer
        self._unpadded = buffer[:, : shape[1] * shape[2] * dtype.itemsize]
        self._hidden_BTD = self._unpadded.view(dtype).view(-1, *shape[1:])
        self._copied: torch.cuda.Event | None = None
        self.piece = range(0)
        self.job: Future[None] = Future()
        self.job.set_result(None)

    def copy_from(self, hidden_BTD: torch.Tensor) -> None:
        """Copy hidden states in; a CUDA device may do so later: see `settle`."""
        self._copy(hidden_BTD, self._hidden_BTD[: len(hidden_BTD)], hidden_BTD.device)

    def copy_to(self, hidden_BTD: torch.Tensor) -> None:
        """Copy hidden states out; a CUDA device may do so later: see `settle`."""
        self._copy(self._hidden_BTD[: len(hidden_BTD)], hidden_BTD, hidden_BTD.device)

    def _copy(self, source_BTD: torch.Tensor, target_BTD: torch.Tensor, device: torch.device) -> None:
        for source_TD, target_TD in zip(source_BTD, target_BTD, strict=True):  # one by one: each has no gaps
            target_TD.copy_(source_TD, non_blocking=device.type == "cuda")
        self._copied = copies_enqueued(device)

    def settle(self) -> None:
        """Return once the device has made the copy it was last told to make."""
        if self._copied is not None:
            self._copied.synchronize()

    def bytes_of(self, piece: range) -> torch.Tensor:
        """Return the part of the buffer that a piece takes, padding and all."""
        return self._rows[: len(piece)].view(-1)

    def checksums(self, piece: range) -> list[int]:
        """Return the crc32 of each sequence of a piece, without its padding."""
        return [zlib.crc32(row.numpy()) for row in self._unpadded[: len(piece)]]


_WAY_OUT = "run again: it goes on from the last committed block; if it comes again, set memory.spool to another disk"


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _under_way(slots: Iterable[_Slot], piece: range) -> "list[Future[None]]":
    """Return the jobs of slots that move sequences of a piece and are not done."""
    return [slot.job for slot in slots if _overlap(slot.piece, piece) and not slot.job.done()]
