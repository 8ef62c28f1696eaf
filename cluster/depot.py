"""Where nodes share no files: finished shards travel to the coordinator's directory, piece by piece, and back.

The depot stands on the coordinator's node; a worker reaches its methods through callables, so nothing here knows what
carries them. One piece at a time is under way and in memory. A file gets its name when all of it has arrived, has the
sha256 it must have and is on the disk; before that there is a temporary beside it, as with every other write.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

from pipeline.durable import atomic_file
from pipeline.errors import StorageError

PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
"""No separator, nothing hidden (temporaries are), and neither `.` nor `..`."""

Write = Callable[[str, int, bytes, int], None]
"""`Depot.write`, or a way to reach it."""
Finish = Callable[[str, str], None]
"""`Depot.finish`, or a way to reach it."""
Read = Callable[[str, int, int], bytes]
"""`Depot.read`, or a way to reach it."""


class Depot:
    """A directory that takes files in and hands them out, by plain name; for one thread at a time.

    Several files may be arriving at once, each from one sender. All methods raise StorageError for a name that is no
    plain file name, and where the disk refuses.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._arriving: dict[str, _Arriving] = {}

    def write(self, file: str, offset: int, piece: bytes, num_bytes: int) -> None:
        """Take the piece of `file` that begins at byte `offset`; the whole file has `num_bytes`.

        Pieces come in order. Offset 0 begins the file anew and drops what an earlier sender left. Raises StorageError
        for a piece that is not the next one, and where the disk is full: the file must then be begun anew.
        """
        path = self._path(file)
        if offset == 0:
            self._drop(file)
            self._arriving[file] = _Arriving(path, num_bytes)
        arriving = self._arriving.get(file)
        next_offset = arriving.num_taken if arriving else 0
        if arriving is None or offset != next_offset:
            raise StorageError(
                f"a piece of {file} begins at byte {offset:,}, but byte {next_offset:,} is due: another sender has "
                "begun the file anew, or the depot has been started again; send the file from its beginning"
            )
        try:
            arriving.take(piece)
        except StorageError:
            self._drop(file)
            raise

    def finish(self, file: str, sha256: str) -> None:
        """Give `file` its name: all of it has been written, and lies on the disk when this returns.

        Raises StorageError unless it has as many bytes as announced and the sha256 (hexadecimal); nothing is kept then.
        """
        path = self._path(file)
        if file not in self._arriving:
            raise StorageError(
                f"{path} cannot be finished: nothing of it is arriving; send the file from its beginning"
            )
        self._arriving.pop(file).finish(sha256)

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` bytes of a finished file from byte `offset` on; fewer where it ends before."""
        return _read_piece(self._path(file), offset, num_bytes)

    def _drop(self, file: str) -> None:
        if file in self._arriving:
            self._arriving.pop(file).close()

    def _path(self, file: str) -> Path:
        if not PLAIN_NAME.fullmatch(file):
            raise StorageError(
                f"{file!r} is no file of {self._directory}: a name has only letters, digits, '_', '-' and '.', and "
                "begins with none of the last two"
            )
        return self._directory / file


def send_file(path: Path, sha256: str, num_bytes: int, write: Write, finish: Finish, piece_bytes: int) -> None:
    """Bring the file at `path` into a depot, under the name it has, in pieces of at most `piece_bytes`.

    `sha256` and `num_bytes` are those of the receipt that its writer was given, so that they hold end to end.
    Raises StorageError where the file cannot be read or does not arrive as it was written, and what a callable raises.
    """
    for offset, piece in _pieces(partial(_read_piece, path), num_bytes, piece_bytes):
        write(path.name, offset, piece, num_bytes)
    finish(path.name, sha256)


def fetch_file(read: Read, path: Path, sha256: str, num_bytes: int, piece_bytes: int) -> None:
    """Bring the file of that name from a depot to `path`, in pieces of at most `piece_bytes`.

    `path` appears whole and durable, or not at all. Raises StorageError where the disk refuses or what arrives has
    another length or sha256, and what `read` raises.
    """
    with closing(_Arriving(path, num_bytes)) as arriving:
        for _, piece in _pieces(partial(read, path.name), num_bytes, piece_bytes):
            arriving.take(piece)
        arriving.finish(sha256)


class _Dropped(Exception):
    """Thrown into a file that is not to be finished; seen by nobody."""


class _Arriving:
    """A file of which some pieces have come: it has a temporary name until `finish`, and is gone after `close`."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes
        self._digest, self.num_taken = hashlib.sha256(), 0
        self._open = ExitStack()
        self._write = self._open.enter_context(atomic_file(path, num_bytes))

    def take(self, piece: bytes) -> None:
        self._write(memoryview(piece))
        self._digest.update(piece)
        self.num_taken += len(piece)

    def finish(self, sha256: str) -> None:
        with self._open:
            found = self._digest.hexdigest()
            if (self.num_taken, found) != (self._num_bytes, sha256):
                raise StorageError(
                    f"{self._path} has not arrived as it was written: {self.num_taken:,} of {self._num_bytes:,} bytes, "
                    f"with the sha256 {found} instead of {sha256}. Nothing of it was kept; run again, and where that "
                    "does not help, test the disk it comes from and the memory of both nodes"
                )

    def close(self) -> None:
        """Remove what has come, if the file was not finished."""
        with suppress(_Dropped), self._open:
            raise _Dropped


def _pieces(read: Callable[[int, int], bytes], num_bytes: int, piece_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield each piece with its offset; `read` takes an offset and a number of bytes, and gives none at the end."""
    offset = 0
    while offset < num_bytes and (piece := read(offset, min(piece_bytes, num_bytes - offset))):
        yield offset, piece
        offset += len(piece)


def _read_piece(path: Path, offset: int, num_bytes: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), num_bytes, offset)
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}; it was finished, so it must be readable: make it so, or run again "
            "in a new output directory"
        ) from error
