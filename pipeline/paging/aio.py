"""Reads and writes through DeepSpeed's asynchronous I/O (libaio), and what it takes to trust it.

The op never looks at what became of its requests: a disk error, or a read that ends early, goes unseen; and what
its authors thought impossible ends the process. So, here:
- sizes are checked before, and the part of a page at the end of a file is read without the op;
- each block of a buffer ends in random bytes when its read begins: if they are still there, that block never came;
- the kernel is asked for an I/O context, and for locked memory, before the op takes them for granted;
- nothing tells that a write failed, so what was written is not to be believed without a checksum of one's own.
"""

import os
import secrets
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import SecateurError, StorageError
from pipeline.paging.aio_op import (
    BLOCK_BYTES,
    build,
    is_built,
    is_installed,
    load,
    locked_buffer,
    new_handle,
    no_word_of_wear,
    require_contexts,
    require_lockable,
)
from pipeline.paging.pager import ALIGNMENT, Span, Transfer, aligned, host_buffer

__all__ = ["AioPager", "build", "is_built", "is_installed"]

NUM_HANDLES = 16
"""Transfers in flight; each has a handle of its own, because a handle waits for all that it was given."""

LOCKABLE_BYTES = 256 << 20
"""Without CUDA the op wants memory that the process has locked; a run needs about this much."""


class AioPager:
    """Reads and writes through DeepSpeed's op, one handle for each transfer in flight."""

    name = "aio"

    def __init__(self, directory: Path, *, pinned: bool = False) -> None:
        """Load the op and try it out in `directory`, an existing one.

        `pinned`: page-lock buffers for fast copies to and from a CUDA device. Raises StorageError where the op
        cannot be loaded, memory cannot be locked, or the file system there has no direct asynchronous I/O.
        """
        self._pinned = pinned
        self._buffers: dict[int, torch.Tensor] = {}
        self._idle: deque[Any] = deque()
        self._num_handles = 0
        self._under_way: dict[_Transfer, None] = {}
        self._lock = threading.Lock()
        try:
            load()
        except (ImportError, OSError) as error:
            raise StorageError(f"DeepSpeed's aio cannot be loaded ({error}); run `secateur doctor --build`") from error
        require_contexts(NUM_HANDLES)
        if not pinned:
            require_lockable(LOCKABLE_BYTES)
        self._try_out(directory)

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [aligned(num_bytes)] in locked host memory, page aligned, kept until `drop_buffer` or `close`.

        Raises StorageError where the process may not lock as much.
        """
        buffer = host_buffer(num_bytes, pinned=True) if self._pinned else locked_buffer(aligned(num_bytes))
        self._buffers[buffer.data_ptr()] = buffer
        return buffer

    def drop_buffer(self, buffer: torch.Tensor) -> None:
        """Keep this buffer no longer."""
        del self._buffers[buffer.data_ptr()]

    def read(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to fill a buffer from `offset` of the file."""
        return self._begin(self._start_read, Span(path=path, offset=offset, buffer=buffer))

    def write(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        """Begin to write a buffer at `offset` of the file."""
        return self._begin(self._start_write, Span(path=path, offset=offset, buffer=buffer))

    def close(self) -> None:
        """Wait for what is in flight, then give everything back."""
        for transfer in list(self._under_way):
            transfer.settle()
        self._idle.clear()
        self._buffers.clear()

    def _begin(self, start: "Callable[[Span], Callable[[], None]]", span: Span) -> Transfer:
        """Start a transfer; `start` returns what completes it."""
        if not load().pins.is_pinned(span.buffer):
            raise ValueError("aio moves buffers of its pager only: any other it would copy into memory of its own")
        try:
            with self._lock:
                transfer = _Transfer(start(span), on_end=self._forget)
                self._under_way[transfer] = None
                return transfer
        except SecateurError as error:
            return _Transfer(failure=error)

    def _forget(self, transfer: "_Transfer") -> None:
        del self._under_way[transfer]

    def _start_read(self, span: Span) -> Callable[[], None]:
        num_bytes = _num_readable(span)
        whole_pages = span.buffer[: num_bytes // ALIGNMENT * ALIGNMENT]
        marks = _Marks(whole_pages)
        handle = self._handle()
        if whole_pages.numel() and handle.pread(whole_pages, str(span.path), False, True, span.offset) != 0:
            self._idle.append(handle)
            raise span.unreadable("it cannot be opened for direct I/O")

        def complete() -> None:
            if whole_pages.numel():
                handle.wait()
            self._idle.append(handle)
            if marks.remain():
                raise span.unreadable("the disk or the file system failed, and a part never came")
            _read_tail(span, len(whole_pages), num_bytes)

        return complete

    def _start_write(self, span: Span) -> Callable[[], None]:
        fd = _opened_to_write(span)
        handle = self._handle()
        handle.async_pwrite(span.buffer, fd, span.offset)

        def complete() -> None:
            handle.wait()
            self._idle.append(handle)
            os.close(fd)

        return complete

    def _handle(self) -> Any:
        """Return a handle with nothing to do; where there is none, wait for the transfer that began first."""
        while not self._idle:
            if self._num_handles < NUM_HANDLES:
                self._num_handles += 1
                return new_handle()
            for transfer in list(self._under_way)[:1]:
                transfer.settle()
        return self._idle.pop()

    def _try_out(self, directory: Path) -> None:
        """Write a page in `directory` and read it back; StorageError unless it comes back."""
        buffer, expected = self.buffer(ALIGNMENT), torch.frombuffer(bytearray(os.urandom(ALIGNMENT)), dtype=torch.uint8)
        try:
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".aio-", suffix=".tmp") as file:
                path = Path(file.name)
                os.truncate(path, ALIGNMENT)
                with no_word_of_wear():
                    self.write(path, 0, buffer.copy_(expected)).wait()
                self.read(path, 0, buffer.zero_()).wait()
        except (OSError, SecateurError) as error:
            raise StorageError(f"DeepSpeed's aio does not work in {directory}: {error}") from error
        if not torch.equal(buffer, expected):
            raise StorageError(f"DeepSpeed's aio does not work in {directory}: what was written did not come back")
        self.drop_buffer(buffer)


class _Transfer:
    """A read or a write that one handle is busy with, or one that failed before it began."""

    def __init__(
        self,
        complete: Callable[[], None] | None = None,
        *,
        on_end: "Callable[[_Transfer], None] | None" = None,
        failure: SecateurError | None = None,
    ) -> None:
        self._complete, self._on_end, self._failure = complete, on_end, failure
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Wait; what went wrong is kept for `wait`."""
        with self._lock:
            if self._complete is None:
                return
            complete, self._complete = self._complete, None
            try:
                complete()
            except SecateurError as error:
                self._failure = error
            finally:  # also after what nobody foresaw: who waits for a handle would wait for this one for ever
                if self._on_end is not None:
                    self._on_end(self)

    def wait(self) -> None:
        self.settle()
        if self._failure is not None:
            raise self._failure


class _Marks:
    """Random bytes where each block of a buffer ends, to see later whether a read has replaced them."""

    def __init__(self, buffer: torch.Tensor) -> None:
        words, per_block = buffer.view(torch.int64), BLOCK_BYTES // 8
        self._ends = (words[per_block - 1 :: per_block], words[-1:])
        self._mark = secrets.randbits(63)
        for ends in self._ends:
            ends.fill_(self._mark)

    def remain(self) -> bool:
        """Tell whether any is still there: by chance, once in 2**63 blocks."""
        return any(bool((ends == self._mark).any()) for ends in self._ends)


def _num_readable(span: Span) -> int:
    try:
        fd = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return span.num_readable(os.fstat(fd).st_size)
        finally:
            os.close(fd)
    except OSError as error:
        raise span.unreadable(error.strerror) from error


def _read_tail(span: Span, begin: int, end: int) -> None:
    """Read the bytes of a last page that is not whole, which the op cannot."""
    try:
        with span.path.open("rb", buffering=0) as file:
            view = span.buffer.numpy().data[begin:end]
            if os.preadv(file.fileno(), [view], span.offset + begin) != end - begin:
                raise span.unreadable("the file became shorter meanwhile")
    except OSError as error:
        raise span.unreadable(error.strerror) from error


def _opened_to_write(span: Span) -> int:
    """Open the span's file for direct writes; the op would make what is missing, and lengthen what is short."""
    assert sys.platform == "linux"
    try:
        fd = os.open(span.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            span.require_writable(os.fstat(fd).st_size)
        except StorageError:
            os.close(fd)
            raise
        return fd
    except OSError as error:
        raise span.unwritable(error.strerror) from error
