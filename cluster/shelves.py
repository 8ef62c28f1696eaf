"""The shelf of a worker that does not see the run directory: shards are sent to the depot, and fetched from it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.depot import Finish, Read, Write, fetch_file, send_file
from pipeline.ledger import Commit

PREFIX = "secateur-shards-"
"""Of the directories of workers that send their shards; the number of their process follows."""

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
    for left in base.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=base) as directory:
        yield Path(directory)


Deliver = Callable[[Commit], None]


def already_there(commit: Commit) -> None:
    """Deliver a shard that was written where the coordinator wants it."""
