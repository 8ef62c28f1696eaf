"""The run's diary: which blocks are done, under which settings, written by one process at a time.

`ledger.jsonl` lies in the run directory and only ever grows, one JSON object a line:

    {"kind": "header", config, source, calibration, versions}    the first line, and no other
    {"kind": "commit", block, file, sha256, num_bytes, ...}      the block's shard is on disk, and final
    {"kind": "note", name, value}                                any other fact; the latest of a name counts

and each line carries a `checksum` of its own. The header appears whole (written aside, then renamed), and
every append is fsynced before it counts, so a crash can tear the last line and no other: a torn last line is
dropped as if it had never been begun, and damage anywhere else is refused. Whoever opens a ledger for writing
must hold the directory's `RunLock`; reading needs none.
"""

import fcntl
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from pipeline.durable import write_atomically
from pipeline.errors import ConfigChanged, RunDirectoryError, RunLocked, StorageError
from pipeline.records import Commit, Header, canonical

LEDGER_NAME = "ledger.jsonl"
LOCK_NAME = "lock"
TOKENS_NAME = "calibration.safetensors"  # what the model has written to be calibrated on, before there is a ledger
SHAPE_NAME = "shape.json"  # which blocks stay, chosen before there is a ledger
_LEFTOVER_DIRECTORIES = {"model", "spool", "report"}  # a run that died early may leave them, empty
_ABSENT = "(absent)"


class Ledger:
    """What is done and what is left: the header, the commits by block, the latest note of each name."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        with _os_errors(f"read {path}"):
            content = path.read_bytes()
        self._path, self._writable, self._num_good_bytes = path, writable, 0
        self.header: Header
        self.commits: dict[int, Commit] = {}
        self.notes: dict[str, JsonValue] = {}
        self._replay(content)

    @classmethod
    def open(cls, run_directory: Path, header: Header) -> "Ledger":
        """Open for writing; where there is no ledger, begin one with `header`, making the directory too.

        Raises `ConfigChanged` where the ledger has another header, `RunDirectoryError` where it is damaged or
        the directory is of another job, `StorageError` where the disk refuses.
        """
        path = run_directory / LEDGER_NAME
        with _os_errors(f"set up the run directory {run_directory}"):
            run_directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                refuse_foreign(run_directory)
                write_atomically(path, _encode({"kind": "header", **asdict(header)}))
        ledger = cls(path, writable=True)
        ledger._compare(header)
        with _os_errors(f"drop the torn last line of {path}"):
            os.truncate(path, ledger._num_good_bytes)
        return ledger

    @classmethod
    def read(cls, run_directory: Path) -> "Ledger":
        """Read and touch nothing, also while a run is writing. Raises `RunDirectoryError`, `StorageError`."""
        path = run_directory / LEDGER_NAME
        if not path.is_file():
            raise RunDirectoryError(
                f"{run_directory} holds no {LEDGER_NAME}, so it is not a run directory; "
                "name the `output` directory of a run"
            )
        return cls(path, writable=False)

    def commit(self, commit: Commit) -> None:
        """Record durably that a block is done; its shard must be on disk already.

        Raises `StorageError` where the disk refuses: the block is then not committed, and may be tried again.
        """
        assert commit.block not in self.commits, f"block {commit.block} is committed already"
        self._append({"kind": "commit", **asdict(commit)})
        self.commits[commit.block] = commit

    def record(self, name: str, value: JsonValue) -> None:
        """Record durably any other fact; the latest of a name counts. Raises `StorageError`."""
        self._append({"kind": "note", "name": name, "value": value})
        self.notes[name] = json.loads(canonical(value))  # a copy: what a reopening would find

    def remaining(self, num_blocks: int) -> range:
        """The blocks still to do, of `num_blocks`. Raises `RunDirectoryError` where commits have a gap."""
        num_done = len(self.commits)
        if sorted(self.commits) != list(range(num_done)) or num_done > num_blocks:
            raise RunDirectoryError(
                f"{self._path} is damaged: it commits the blocks {sorted(self.commits)} of {num_blocks}, not "
                "the first ones in order; start again in a new output directory"
            )
        return range(num_done, num_blocks)

    def _append(self, fields: dict[str, JsonValue]) -> None:
        assert self._writable, f"{self._path} was opened only to be read"
        line = _encode(fields)
        with _os_errors(f"append to {self._path}"), self._path.open("r+b", buffering=0) as file:
            file.truncate(self._num_good_bytes)  # drops what a failed append has left
            file.seek(self._num_good_bytes)
            left = line
            while left:  # a disk that is nearly full takes a part
                left = left[os.write(file.fileno(), left) :]
            os.fsync(file.fileno())
        self._num_good_bytes += len(line)

    def _replay(self, content: bytes) -> None:
        """Take every line in turn, but for a torn last one; the header's cannot be torn."""
        lines = io.BytesIO(content).readlines() or [b""]
        for number, line in enumerate(lines, start=1):
            fields = _decode(line)
            if fields is None and 1 < number == len(lines):
                return
            try:
                self._take(fields, first=number == 1)
            except ValueError as error:
                raise RunDirectoryError(
                    f"{self._path}, line {number}: {error}; was it changed, or written by a newer version of "
                    "secateur? start again in a new output directory"
                ) from error
            self._num_good_bytes += len(line)

    def _take(self, fields: dict[str, JsonValue] | None, *, first: bool) -> None:
        """Put the facts of one line where they belong. Raises `ValueError` (pydantic's too) if it cannot."""
        match fields:
            case None:
                raise ValueError("damaged, cut short or with a wrong checksum, and not by a crash")
            case {"kind": "header"} if first:
                self.header = TypeAdapter(Header).validate_python(fields)
            case {"kind": "commit"} if not first:
                commit = TypeAdapter(Commit).validate_python(fields)
                if self.commits.setdefault(commit.block, commit) is not commit:
                    raise ValueError(f"damaged, it commits block {commit.block} a second time")
            case {"kind": "note", "name": str(name), "value": value} if not first:
                self.notes[name] = value
            case _:
                raise ValueError(f"a line of the kind {fields.get('kind')!r} is unknown, or out of place")

    def _compare(self, asked: Header) -> None:
        """Raise `ConfigChanged`, listing every difference, unless `asked` is the header found."""
        found = self.header
        differences = [
            *_differences("", found.config, asked.config),
            *_differences("the source checkpoint changed", found.source, asked.source),
            *_differences("the calibration tokens changed", found.calibration, asked.calibration),
        ]
        if differences:
            listed = "\n  ".join([f"{self._path.parent} belongs to a run with other settings:", *differences])
            raise ConfigChanged(f"{listed}\nuse another output directory, or restore the setting")


class RunLock:
    """Holds a run directory for this process while the `with` block runs.

    The kernel keeps the lock and drops it with the process, however that dies. The file stays behind: were it
    removed, one process could lock the old file and another a new one of the same name.
    """

    def __init__(self, run_directory: Path) -> None:
        self._path, self._held = run_directory / LOCK_NAME, ExitStack()

    def __enter__(self) -> "RunLock":
        """Take it, making the directory too. Raises `RunLocked` where another has it, else `StorageError`."""
        with _os_errors(f"lock {self._path}"), ExitStack() as taken:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = taken.enter_context(self._path.open("a+b", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(file.fileno(), 512, 0).decode(errors="replace") or "another process"
                raise RunLocked(
                    f"{self._path.parent} is in use by {holder}; one process at a time may work there: "
                    "wait for it, stop it, or use another output directory"
                ) from error
            # Closing alone would not release it where a forked child has the file open too.
            taken.callback(fcntl.flock, file, fcntl.LOCK_UN)
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            file.write(f"process {os.getpid()} on host {socket.gethostname()}, started {started}".encode())
            self._held = taken.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()


def _encode(fields: dict[str, JsonValue]) -> bytes:
    checksum = hashlib.sha256(canonical(fields)).hexdigest()[:16]
    return canonical({**fields, "checksum": checksum}) + b"\n"


def _decode(line: bytes) -> dict[str, JsonValue] | None:
    """The fields of one line, or None where `_encode` cannot have written it."""
    try:
        fields: dict[str, JsonValue] = json.loads(line)
        fields.pop("checksum")
        return fields if _encode(fields) == line else None
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _differences(path: str, found: JsonValue, asked: JsonValue) -> Iterator[str]:
    """One line for each leaf that differs, named by its dotted path; a list is one leaf."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted(found.keys() | asked.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differences(inner, found.get(key, _ABSENT), asked.get(key, _ABSENT))
    elif canonical(found) != canonical(asked):
        yield f"{path}: {canonical(found).decode()} in the ledger, {canonical(asked).decode()} asked for"


def refuse_foreign(run_directory: Path) -> None:
    """Raise `RunDirectoryError` where a directory without a ledger holds what no run of ours leaves there."""
    foreign = sorted(path.name for path in run_directory.glob("*") if not _is_leftover(path))
    if foreign and LEDGER_NAME not in foreign:
        raise RunDirectoryError(
            f"{run_directory} is an existing output directory of another job: it holds no {LEDGER_NAME} but "
            f"{', '.join(foreign[:3])} ({len(foreign)} in all); name a new or empty output directory"
        )


def _is_leftover(path: Path) -> bool:
    if path.is_dir():
        is_ours = path.name == "spool" and _is_lock(path.with_name(LOCK_NAME))  # of a run that died while it chose
        is_empty = path.name in _LEFTOVER_DIRECTORIES and all(file.suffix == ".tmp" for file in path.iterdir())
        return is_ours or is_empty
    return path.suffix == ".tmp" or path.name in (TOKENS_NAME, SHAPE_NAME) or _is_lock(path)


def _is_lock(path: Path) -> bool:
    return path.name == LOCK_NAME and path.is_file() and path.read_bytes()[:8] in (b"", b"process ")


@contextmanager
def _os_errors(doing: str) -> Iterator[None]:
    """Turn every `OSError` into a `StorageError` that says what was being done."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {doing}: {error.strerror}; make room or put the permissions right, and run again: "
            "what was committed before is safe"
        ) from error
