"""Files that appear whole and durable, or not at all, whatever happens while they are written."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file: whole and durable, or not at all; StorageError where the disk refuses."""
    with atomic_file(path, len(content)) as write:
        write(memoryview(content))


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files that writes killed midway left in `directory`; no write may be under way."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink()


@contextmanager
def atomic_file(path: Path, num_bytes: int) -> Iterator[Callable[[memoryview], None]]:
    """Yield a function that appends flat bytes to a temporary file, which becomes `path` when all went well.

    The file is fsynced, then renamed, then its directory is fsynced: after that a power cut loses nothing.
    The temporary name is random, so that two writers (one thought dead) can never mix their bytes.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    disk = partial(_storage_errors, path, num_bytes, _free_bytes(path.parent))
    with disk():
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(piece: memoryview) -> None:
        with disk():
            while piece:
                piece = piece[os.write(fd, piece) :]

    try:
        yield write
        with disk():
            os.fsync(fd)
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        os.close(fd)
        with suppress(OSError):  # gone after the rename; and no clean-up may hide the first error
            temporary.unlink()


def fsync_directory(directory: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _free_bytes(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,}"
    except OSError:
        return "an unknown number"


@contextmanager
def _storage_errors(path: Path, num_bytes: int, free_bytes: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}. It needs {num_bytes:,} bytes, and {free_bytes} were "
            "free when it began; free space or make the directory writable, then run again"
        ) from error
