"""The shelf of a worker that does not see the run directory: shards are sent to the depot, and fetched from it."""

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.depot import Finish, Read, Write, fetch_file, send_file
from pipeline.records import Commit

PREFIX = "secateur-shards-"
"""Of the directories of workers that send their shards."""

IN_USE = "in-use"
"""A file in each of them that its worker has locked: the lock goes with the process, on whatever node that was."""

PIECE_BYTES = 8 << 20
"""Of a shard on its way: what a transfer holds in memory, here and at the depot."""


@dataclass(frozen=True, slots=True)
class SentShelf:
    """Shards pass through a directory of this worker's own and never stay there."""

    directory: Path
    write: Write
    finish: Finish
    read: Read

    def deliver(self, commit: Commit) -> None:
        """Send a shard that was written here, then drop it."""
        path = self.directory / commit.file
        send_file(path, commit.sha256, commit.num_bytes, self.write, self.finish, PIECE_BYTES)
        path.unlink()

    @contextmanager
    def take_out(self, commit: Commit) -> Iterator[Path]:
        """Fetch a committed shard for as long as the `with` block runs; StorageError unless it arrives whole."""
        path = self.directory / commit.file
        fetch_file(self.read, path, commit.sha256, commit.num_bytes, PIECE_BYTES)
        try:
            yield path
        finally:
            path.unlink()


@contextmanager
def own_directory(scratch: Path | None) -> Iterator[Path]:
    """Make a directory for this process's shards while the `with` block runs, having removed those of the dead."""
    base = Path(tempfile.gettempdir()) if scratch is None else scratch
    base.mkdir(parents=True, exist_ok=True)
    for left in base.glob(f"{PREFIX}*"):
        _remove_unless_in_use(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=base) as name:
        directory = Path(name)
        with (directory / "new").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (directory / "new").rename(directory / IN_USE)  # under this name it has been locked from the first
            yield directory


def _remove_unless_in_use(directory: Path) -> None:
    with suppress(OSError), (directory / IN_USE).open("r+") as file:  # in use, not ours, or gone by now
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)


Deliver = Callable[[Commit], None]


def already_there(commit: Commit) -> None:
    """Deliver a shard that was written where the coordinator wants it."""
