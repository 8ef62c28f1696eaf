"""How fast this machine's disk, arithmetic and copies to the device really are, by doing a little of each."""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch

from pipeline.meter import synchronise
from pipeline.paging.pager import Pager, Transfer, aligned, host_buffer
from pipeline.paging.spool import allocate

PIECE_BYTES = 4 << 20
NUM_PIECES = 8
"""Pieces in flight when a disk is measured: what a run has."""

COPY_BYTES = 64 << 20
NUM_TRIES = 3
"""The best of these counts: what disturbs a measurement makes it slower, never faster."""


def disk_speed(directory: Path, pager: Pager, num_bytes: int) -> tuple[float, float]:
    """Write `num_bytes` (rounded up to pieces) in `directory` and read them back; bytes per second of each.

    Random bytes, which no file system can compress, past the page cache where it lets us. The file is gone
    afterwards. Raises OSError or StorageError where the disk refuses.
    """
    num_bytes = aligned(num_bytes)
    piece_bytes = min(PIECE_BYTES, num_bytes)
    offsets = range(0, num_bytes - piece_bytes + 1, piece_bytes)
    buffers = [pager.buffer(piece_bytes) for _ in range(min(NUM_PIECES, len(offsets)))]
    for buffer in buffers:
        buffer.copy_(torch.frombuffer(bytearray(os.urandom(piece_bytes)), dtype=torch.uint8))
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-", suffix=".tmp") as file:
            allocate(file.fileno(), num_bytes)
            moves = (pager.write, pager.read)
            seconds = [_seconds(move, Path(file.name), offsets, buffers) for move in moves]
    finally:
        for buffer in buffers:
            pager.drop_buffer(buffer)
    moved = len(offsets) * piece_bytes
    return moved / seconds[0], moved / seconds[1]


def _seconds(
    move: Callable[[Path, int, torch.Tensor], Transfer], path: Path, offsets: range, buffers: Sequence[torch.Tensor]
) -> float:
    """Seconds to move one buffer at each offset, with all buffers in flight."""
    in_flight: deque[Transfer] = deque()
    began = perf_counter()
    for offset, buffer in zip(offsets, cycle(buffers), strict=False):
        if len(in_flight) == len(buffers):
            in_flight.popleft().wait()
        in_flight.append(move(path, offset, buffer))
    for transfer in in_flight:
        transfer.wait()
    return perf_counter() - began


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of a product of two `size` x `size` matrices (2 size^3 of them).

    Raises RuntimeError where the device has no such arithmetic, or no room for the matrices.
    """
    # Random numbers: constant matrices draw less power, and a device then runs faster than it will at work.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.rand(size, size, dtype=dtype, device=device, generator=generator)
    return 2 * size**3 / _best_seconds(lambda: left @ left, device)


def copy_speed(device: torch.device) -> float:
    """Return the bytes per second of copies from host memory (pinned for a CUDA device) to the device."""
    source = host_buffer(COPY_BYTES, pinned=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return COPY_BYTES / _best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the best of some tries, after one to warm up."""
    seconds = []
    for _ in range(1 + NUM_TRIES):
        began = perf_counter()
        work()
        synchronise(device)
        seconds.append(perf_counter() - began)
    return min(seconds[1:])
