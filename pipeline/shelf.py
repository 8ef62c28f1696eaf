"""Where a worker keeps the shards it writes, and finds those that are committed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from pipeline.errors import RunDirectoryError
from pipeline.records import Commit
from pipeline.shards import hash_file


class Shelf(Protocol):
    """The committed shards of a run, as one worker reaches them."""

    @property
    def directory(self) -> Path:
        """Where this worker writes a shard, before it is committed."""

    def take_out(self, commit: Commit) -> AbstractContextManager[Path]:
        """Give a committed shard's file while the `with` block runs.

        Raises RunDirectoryError when it is not the one that was committed.
        """


class ModelDirectory:
    """The model directory itself, which this process sees."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def take_out(self, commit: Commit) -> Iterator[Path]:
        """Give a committed shard's file; raises RunDirectoryError when it is not the one that was committed."""
        path = self.directory / commit.file
        found = hash_file(path) if path.exists() else "no file"
        if found != commit.sha256:
            raise RunDirectoryError(
                f"{path} is not the shard that block {commit.block} committed (sha256 {commit.sha256[:12]}…, found "
                f"{found[:12]}): it was changed or removed afterwards. Restore it, or start in a new output directory"
            )
        yield path
