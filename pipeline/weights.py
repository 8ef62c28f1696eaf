"""Blocks' weights, brought from the checkpoint to where blocks run, and read ahead while another block is worked on.

With a pager they come past the page cache, several pieces at a time, into buffers that are used again and again:

    disk -> pieces in flight -> host tensors of the next block -> device

On a CPU the host tensors become the block's parameters as they are. Without a pager the kernel is asked to read
ahead into its page cache, and the tensors are read from there.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType

import torch
from torch import nn

from pipeline.attention import HeadLayout
from pipeline.budget import Budget, Lease
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.meter import synchronise
from pipeline.paging.pager import ALIGNMENT, Pager, Transfer, aligned, host_buffer
from pipeline.shards import TensorEntry
from pipeline.skeleton import Skeleton, TensorSource

PIECE_BYTES = 8 << 20
"""Bytes asked for at once; a multiple of the alignment and of every dtype's size."""

NUM_PIECES = 4
"""Pieces in flight: deep enough for a solid-state disk, and what the buffers take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """An aligned range of a file that holds some bytes of one tensor."""

    name: str
    offset: int
    """In the file, aligned."""

    num_bytes: int
    """To be read, aligned."""

    skip: int
    """Bytes of the range before the tensor's."""

    begin: int
    end: int
    """The tensor's bytes that are in the range."""


def pieces_of(name: str, entry: TensorEntry) -> Iterator[Piece]:
    """Cut the bytes of one tensor into aligned pieces."""
    stop = entry.start + entry.num_bytes
    for offset in range(entry.start // ALIGNMENT * ALIGNMENT, stop, PIECE_BYTES):
        first, last = max(entry.start, offset), min(stop, offset + PIECE_BYTES)
        yield Piece(
            name=name, offset=offset, num_bytes=aligned(last - offset), skip=first - offset,
            begin=first - entry.start, end=last - entry.start,
        )  # fmt: skip


class BlockWeights:
    """Loads the blocks of one skeleton; a context manager. For one thread, beside which it reads ahead in another."""

    def __init__(self, skeleton: Skeleton, budget: Budget, pager: Pager | None = None) -> None:
        self._skeleton, self._budget, self._pager = skeleton, budget, pager
        self._leases: dict[int, Lease] = {}
        self._coming: dict[int, tuple[Future[dict[str, torch.Tensor]], Lease]] = {}
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._buffers: list[torch.Tensor] = []
        self._staging: dict[str, torch.Tensor] = {}
        """For a device: page-locked bytes of each tensor, by parameter name, used again for every block."""

        self._staging_lease: Lease | None = None
        self._is_cpu = skeleton.device.type == "cpu"

        self._buffer_lease: Lease | None = None
        self.waited = 0.0
        """Seconds spent waiting for the disk."""

        self.bytes_read = 0

    def __enter__(self) -> "BlockWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what is being read, and give back the buffers; blocks that are loaded stay."""
        self._reader.shutdown(cancel_futures=True)
        for _, lease in self._coming.values():
            lease.give_back()
        self._coming.clear()
        for buffer in self._buffers:
            assert self._pager is not None
            self._pager.drop_buffer(buffer)
        self._buffers.clear()
        self._staging.clear()
        for kept in (self._buffer_lease, self._staging_lease):
            if kept is not None:
                kept.give_back()

    def expect(self, index: int) -> None:
        """Begin to read a block that will be loaded next. Raises BudgetExceeded where there is no room for it.

        For a device one block may be coming at a time: its bytes wait where those of the next one will be put.
        """
        if self._pager is None:
            self._skeleton.checkpoint.will_need(self._skeleton.block_names(index).values())
        elif index not in self._coming:
            assert self._is_cpu or not self._coming, f"block {index} would overwrite {list(self._coming)}"
            lease = self._lease_of_staging(index)
            self._coming[index] = (self._reader.submit(self._read, index, self._pager), lease)

    def load(
        self,
        index: int,
        source: TensorSource | None = None,
        width: int | None = None,
        heads: HeadLayout | None = None,
    ) -> nn.Module:
        """Put a block's weights where blocks run: the checkpoint's, or those of another source with its names.

        width, heads: of the block in that source, where they are fewer than in the checkpoint.
        """
        began = perf_counter()
        try:
            if source is None and self._pager is not None:
                self.expect(index)
                return self._adopt(index)
            self._take_device(index)
            if width is not None:
                self._skeleton.reshape_block(index, width, heads)
            return self._skeleton.load_block(index, source or self._skeleton.checkpoint)
        finally:
            self.waited += perf_counter() - began

    def drop(self, index: int) -> None:
        """Drop a block's weights; nothing where they are not loaded."""
        self._skeleton.release_block(index)
        lease = self._leases.pop(index, None)
        if lease is not None:
            lease.give_back()

    def _adopt(self, index: int) -> nn.Module:
        future, staged = self._coming.pop(index)
        try:
            tensors = future.result()
            if self._is_cpu:
                staged.give_back()  # the same memory, by another name
            self._take_device(index)
            block = self._skeleton.adopt_block(index, tensors)
            synchronise(self._skeleton.device)  # the staging is used again for the next block
            return block
        finally:
            if self._is_cpu:
                staged.give_back()

    def _take_device(self, index: int) -> None:
        self.drop(index)
        num_bytes = self._skeleton.block_numel(index) * self._skeleton.dtype.itemsize
        self._leases[index] = self._budget.take("device", num_bytes, f"the weights of block {index}")

    def _lease_of_staging(self, index: int) -> Lease:
        """Take the host bytes of a block that is read: on a CPU in the dtype it runs in, else as it is stored.

        For a device they are those of the largest block, and kept for all of them.
        """
        skeleton = self._skeleton
        if self._is_cpu:
            num_bytes = skeleton.block_numel(index) * skeleton.dtype.itemsize
            return self._budget.take("host", num_bytes, f"the weights of block {index}, read ahead")
        if self._staging_lease is None:
            largest = max(skeleton.block_numel(block) for block in range(skeleton.num_blocks))
            num_bytes = largest * skeleton.checkpoint.matrix_dtype().itemsize
            self._staging_lease = self._budget.take("host", num_bytes, "the weights of a block on their way")
        return self._staging_lease

    def _read(self, index: int, pager: Pager) -> dict[str, torch.Tensor]:
        """Read all tensors of a block, by parameter name."""
        checkpoint, names = self._skeleton.checkpoint, self._skeleton.block_names(index)
        if not self._buffers:
            self._buffer_lease = self._budget.take("host", NUM_PIECES * PIECE_BYTES, "buffers for reading weights")
            self._buffers += [pager.buffer(PIECE_BYTES) for _ in range(NUM_PIECES)]
        tensors = {own: self._empty(index, own, stored) for own, stored in names.items()}
        targets = {stored: tensors[own] for own, stored in names.items()}
        in_flight: deque[tuple[Piece, torch.Tensor, Transfer]] = deque()
        try:
            for number, (path, piece) in enumerate(self._pieces(targets)):
                if len(in_flight) == NUM_PIECES:
                    self._take_in(*in_flight.popleft(), targets)
                buffer = self._buffers[number % NUM_PIECES]
                in_flight.append((piece, buffer, pager.read(path, piece.offset, buffer[: piece.num_bytes])))
            while in_flight:
                self._take_in(*in_flight.popleft(), targets)
        finally:  # nothing may write into a buffer once another read has it
            for _, _, transfer in in_flight:
                with suppress(CheckpointError):  # another error is being raised already
                    transfer.wait()
        for stored, target in targets.items():
            if not _comes_in_pieces(checkpoint, stored, target):
                checkpoint.read_into(stored, target)
        return tensors

    def _empty(self, index: int, own: str, stored: str) -> torch.Tensor:
        skeleton, entry = self._skeleton, self._skeleton.checkpoint.tensors[stored]
        if self._is_cpu:
            return torch.empty(entry.shape, dtype=skeleton.dtype_of(index, own))
        staged = self._staging.get(own)
        if staged is None or len(staged) < entry.num_bytes:
            staged = self._staging[own] = host_buffer(entry.num_bytes, pinned=skeleton.device.type == "cuda")
        return staged[: entry.num_bytes].view(entry.dtype).view(entry.shape)

    def _pieces(self, targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[Path, Piece]]:
        """Yield what is to be read, in the order of the files."""
        checkpoint = self._skeleton.checkpoint
        entries = {n: checkpoint.tensors[n] for n, t in targets.items() if _comes_in_pieces(checkpoint, n, t)}
        for name in sorted(entries, key=lambda n: (checkpoint.shard_of[n], entries[n].start)):
            path = checkpoint.locate(name)
            for piece in pieces_of(name, entries[name]):
                yield path, piece

    def _take_in(
        self, piece: Piece, buffer: torch.Tensor, transfer: Transfer, targets: Mapping[str, torch.Tensor]
    ) -> None:
        """Copy one piece that has come into its tensor, converting its dtype."""
        transfer.wait()
        stored = self._skeleton.checkpoint.tensors[piece.name].dtype
        values = buffer[piece.skip : piece.skip + piece.end - piece.begin].view(stored)
        start = piece.begin // stored.itemsize
        targets[piece.name].view(-1)[start : start + len(values)].copy_(values)
        self.bytes_read += piece.end - piece.begin


def _comes_in_pieces(checkpoint: Checkpoint, name: str, target: torch.Tensor) -> bool:
    """Tell whether a tensor's numbers lie in a file, at multiples of their size, and are floats or stay what they are.

    So it is in all but odd files, whose tensors the checkpoint reads, or refuses, and zeros that it makes.
    """
    if name not in checkpoint.shard_of:
        return False
    entry = checkpoint.tensors[name]
    both_float = target.is_floating_point() and entry.dtype.is_floating_point
    return entry.start % entry.dtype.itemsize == 0 and (both_float or target.dtype == entry.dtype)
