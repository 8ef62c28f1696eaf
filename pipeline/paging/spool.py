"""The directory of one run's hidden states on disk: emptied when opened, removed at the end, also after a crash.

A run owns it as it owns its run directory, whose lock keeps every other run away from both.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.paging.pager import aligned


def spool_directory(config_spool: Path | None, output: Path) -> Path:
    """Return where the run in `output` spools: within it, or in a directory of its own under `memory.spool`."""
    if config_spool is None:
        return output / "spool"
    return config_spool / f"secateur-{hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:12]}"


def worker_spool(directory: Path, stage: int, replica: int) -> Path:
    """Return where one worker of a cluster job spools: beside the directory of a run in one process."""
    return directory.with_name(f"{directory.name}-{stage}-{replica}")


def remove_leftovers(directory: Path) -> None:
    """Remove what a crash has left of a run's spool, and of its workers'; the run directory's lock is held.

    Raises StorageError where it cannot be removed.
    """
    beside = directory.parent.iterdir() if directory.parent.is_dir() else ()
    workers = [path for path in beside if re.fullmatch(rf"{re.escape(directory.name)}-\d+-\d+", path.name)]
    try:
        for left in (directory, *workers):
            if left.is_dir():
                shutil.rmtree(left)
    except OSError as error:
        raise StorageError(
            f"cannot remove the spool {error.filename}, which an earlier session has left: {error.strerror or error}; "
            "remove it, then run again"
        ) from error


def existing(directory: Path) -> Path:
    """Return a directory, or the nearest of its parents that exists: on the same disk, as far as one can tell."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


class Spool:
    """Preallocated files in a directory that holds nothing else."""

    def __init__(self, directory: Path, limit: int | None) -> None:
        """Use an empty directory; `opened` makes one. `limit`: the most bytes all files may have together."""
        self.directory = directory
        self._limit = limit
        self._sizes: dict[Path, int] = {}

    @classmethod
    @contextmanager
    def opened(cls, directory: Path, limit: int | None) -> Iterator["Spool"]:
        """Give the spool while the `with` block runs: what a crash left there is removed before, all of it after.

        Raises StorageError where the directory cannot be made or emptied.
        """
        try:
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the spool {directory}: {error.strerror or error}; set memory.spool to a directory this "
                "user can write, on a disk with room"
            ) from error
        try:
            yield cls(directory, limit)
        finally:
            with suppress(OSError):  # no clean-up may hide the first error; what is left, the next run removes
                shutil.rmtree(directory)

    def create(self, name: str, num_bytes: int) -> Path:
        """Make a file of `aligned(num_bytes)` whose room on the disk is taken at once, and return its path.

        Raises StorageError where the limit or the disk has no room for it.
        """
        assert Path(name).name == name, f"{name!r} is no plain file name"
        path, size = self.directory / name, aligned(num_bytes)
        self._check_limit(name, size)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                allocate(fd, size)
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError(
                f"cannot make room for {name} in the spool {self.directory}: {error.strerror}. It needs {size:,} "
                f"bytes, and {_free_bytes(self.directory)} are free; free space, set memory.spool to a larger disk, or "
                "lower calibration.sequences"
            ) from error
        self._sizes[path] = size
        return path

    def remove(self, path: Path) -> None:
        """Remove a file that `create` made; it counts no longer."""
        del self._sizes[path]
        path.unlink(missing_ok=True)

    def _check_limit(self, name: str, size: int) -> None:
        held = sum(self._sizes.values())
        if self._limit is not None and held + size > self._limit:
            raise StorageError(
                f"{name} needs {size:,} bytes, and {held:,} of the {self._limit:,} bytes of memory.spool_limit are "
                "taken; raise it, or lower calibration.sequences"
            )


def allocate(fd: int, num_bytes: int) -> None:
    """Give an empty file its size and its room on the disk; OSError where there is none."""
    if sys.platform == "linux" and num_bytes:
        os.posix_fallocate(fd, 0, num_bytes)
    else:
        os.truncate(fd, num_bytes)


def _free_bytes(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,}"
    except OSError:
        return "an unknown number"
