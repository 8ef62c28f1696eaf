"""Moves bytes between files and buffers that are used again and again: many at once, past the page cache.

    buffer = pager.buffer(8 << 20)
    transfer = pager.read(path, offset, buffer)     # returns at once
    ...                                             # compute meanwhile
    transfer.wait()                                 # the bytes are there, or an error that names them

Offsets and sizes are multiples of ALIGNMENT, as direct I/O wants them. A read may go as far as the file's size
rounded up to ALIGNMENT: what the buffer then holds beyond the file's last byte is nobody's. A write stays within the
file, which was given its size before. The engines: ThreadPager, here, and pipeline/paging/aio.py.
"""

import concurrent.futures
import ctypes
import errno
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.errors import CheckpointError, StorageError

ALIGNMENT = 4096
"""Bytes; a page, and a multiple of every disk's sector."""

NUM_THREADS = 16
"""Enough for a solid-state disk's queue; they wait in the kernel, and cost no processor."""

THREAD_BYTES = 4 << 20
"""The most bytes one thread moves in one call; larger transfers are split among threads."""


def aligned(num_bytes: int) -> int:
    """Return `num_bytes` rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Transfer(Protocol):
    """A read or a write under way."""

    def wait(self) -> None:
        """Return once it is done and the buffer may be used again; every later call says the same.

        Raises CheckpointError for a read, StorageError for a write, naming the file and the range.
        """


class Pager(Protocol):
    """One engine of asynchronous file I/O; may be used by several threads.

    What goes wrong with a file is raised by `wait`, never by `read` or `write`; a misaligned request is a ValueError.
    """

    name: str
    """`aio` or `threads`."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [aligned(num_bytes)] in page-aligned host memory, kept until `drop_buffer` or `close`.

        The memory goes back to the system then, or when the last tensor that shares it goes, if that is later.
        """

    def drop_buffer(self, buffer: torch.Tensor) -> None:
        """Keep this buffer no longer."""

    def read(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to fill a buffer, or an aligned slice of one, from `offset` of the file."""

    def write(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to write a buffer, or an aligned slice of one, at `offset` of the file, within its size."""

    def close(self) -> None:
        """Wait for what is in flight, then give everything back; the pager takes no more requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The range of a file that a buffer is filled from, or written to. Raises ValueError where it is misaligned."""

    path: Path
    offset: int
    buffer: torch.Tensor

    def __post_init__(self) -> None:
        buffer = self.buffer
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.device.type != "cpu":
            raise ValueError(f"a pager moves flat uint8 host buffers, not {buffer.dtype} {tuple(buffer.shape)}")
        if (self.offset | buffer.numel() | buffer.data_ptr()) % ALIGNMENT or not buffer.is_contiguous():
            raise ValueError(
                f"{buffer.numel()} bytes at offset {self.offset} of {self.path}: offset, size and the buffer's "
                f"address must be multiples of {ALIGNMENT}"
            )

    @property
    def stop(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.buffer.numel()

    def pieces(self, num_bytes: int) -> "Iterator[Span]":
        """Split into spans of at most `num_bytes`, a multiple of ALIGNMENT."""
        for begin in range(0, self.buffer.numel(), num_bytes):
            yield Span(path=self.path, offset=self.offset + begin, buffer=self.buffer[begin : begin + num_bytes])

    def num_readable(self, file_size: int) -> int:
        """Return how many of the span's bytes the file has; CheckpointError unless it ends within the last page."""
        if self.stop > aligned(file_size):
            raise self.unreadable(f"the file has {file_size:,} bytes")
        return min(self.stop, file_size) - self.offset

    def require_writable(self, file_size: int) -> None:
        """Raise StorageError unless the file has room for the span."""
        if self.stop > file_size:
            raise self.unwritable(f"the file has {file_size:,} bytes; something has shortened it")

    def unreadable(self, reason: str | None) -> CheckpointError:
        """Return the error of a read that failed."""
        return CheckpointError(
            f"cannot read bytes {self.offset:,} to {self.stop:,} of {self.path}: {reason}; the file must be whole and "
            "its disk sound"
        )

    def unwritable(self, reason: str | None) -> StorageError:
        """Return the error of a write that failed."""
        return StorageError(
            f"cannot write bytes {self.offset:,} to {self.stop:,} of {self.path}: {reason}; make the directory "
            "writable, or set memory.spool to another disk, then run again"
        )


class ThreadPager:
    """Positioned reads and writes by a pool of threads, with O_DIRECT where the file system takes it."""

    name = "threads"

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: page-lock buffers for fast copies to and from a CUDA device."""
        self._pinned = pinned
        self._buffers: dict[int, torch.Tensor] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(NUM_THREADS, "pager")

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [aligned(num_bytes)] in host memory, page aligned, kept until `drop_buffer` or `close`."""
        buffer = host_buffer(num_bytes, pinned=self._pinned)
        self._buffers[buffer.data_ptr()] = buffer
        return buffer

    def drop_buffer(self, buffer: torch.Tensor) -> None:
        """Keep this buffer no longer."""
        del self._buffers[buffer.data_ptr()]

    def read(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to fill a buffer from `offset` of the file."""
        return self._begin(_read, Span(path=path, offset=offset, buffer=buffer))

    def write(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to write a buffer at `offset` of the file."""
        return self._begin(_write, Span(path=path, offset=offset, buffer=buffer))

    def close(self) -> None:
        """Wait for what is in flight, then give everything back."""
        self._threads.shutdown()
        self._buffers.clear()

    def _begin(self, move: Callable[[Span], None], span: Span) -> Transfer:
        return _Pieces([self._threads.submit(move, piece) for piece in span.pieces(THREAD_BYTES)])


class _Pieces:
    """A transfer that several threads share."""

    def __init__(self, pieces: list[concurrent.futures.Future[None]]) -> None:
        self._pieces = pieces

    def wait(self) -> None:
        concurrent.futures.wait(self._pieces)  # all of them, also after an error: none may touch the buffer later
        for piece in self._pieces:
            piece.result()


def _read(span: Span) -> None:
    try:
        with _opened(span.path, os.O_RDONLY) as fd:
            num_bytes = span.num_readable(os.fstat(fd).st_size)
            _move_all(os.preadv, fd, span, num_bytes)
            _forget(fd, span)
    except OSError as error:
        raise span.unreadable(error.strerror) from error


def _write(span: Span) -> None:
    try:
        with _opened(span.path, os.O_WRONLY) as fd:
            span.require_writable(os.fstat(fd).st_size)
            _move_all(os.pwritev, fd, span, span.buffer.numel())
            if not _is_direct(fd):
                os.fsync(fd)  # the page cache forgets only what is on the disk
                _forget(fd, span)
    except OSError as error:
        raise span.unwritable(error.strerror) from error


def _move_all(call: Callable[[int, list[memoryview], int], int], fd: int, span: Span, num_bytes: int) -> None:
    """Repeat a positioned call until `num_bytes` are moved; OSError where it fails or moves nothing."""
    view, done = span.buffer.numpy().data, 0
    while done < num_bytes:
        try:
            moved = call(fd, [view[done:]], span.offset + done)
        except OSError as error:
            # Some file systems take the flag and refuse the call; so do all where a file ends off the alignment.
            if error.errno != errno.EINVAL or not _is_direct(fd):
                raise
            _set_direct(fd, False)
            continue
        if moved == 0:
            raise OSError(errno.EIO, "the file became shorter meanwhile")
        done += moved


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        _set_direct(fd, True)
        yield fd
    finally:
        os.close(fd)


def _is_direct(fd: int) -> bool:
    if sys.platform == "linux":
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
    return False


def _set_direct(fd: int, asked: bool) -> None:
    """Turn direct I/O on where the file system has it (tmpfs may not), or off."""
    if sys.platform == "linux":
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if asked else flags & ~os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


def _forget(fd: int, span: Span) -> None:
    """Take a span out of the page cache, which holds it where direct I/O was refused."""
    if sys.platform == "linux" and not _is_direct(fd):
        os.posix_fadvise(fd, span.offset, span.buffer.numel(), os.POSIX_FADV_DONTNEED)


def host_buffer(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Return uint8 [aligned(num_bytes)], page aligned, straight from the system and straight back when it goes.

    `pinned` locks the pages for CUDA in place: torch's own pinned memory comes in powers of two and stays with torch.
    """
    memory = mmap.mmap(-1, max(aligned(num_bytes), ALIGNMENT))
    owner = (ctypes.c_uint8 * aligned(num_bytes)).from_buffer(memory)
    if pinned:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(ctypes.addressof(owner), len(memory), 0))
        # The arguments keep the mapping until it is unlocked; at exit the whole process goes.
        weakref.finalize(owner, _unpin, runtime, ctypes.addressof(owner), memory).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


def _unpin(runtime: Any, address: int, memory: mmap.mmap) -> None:
    runtime.cudaHostUnregister(address)
