"""Writing files that are whole and durable, or not there."""

import errno
import os
import stat
from pathlib import Path

import pytest

from pipeline.durable import write_atomically
from pipeline.errors import StorageError


def full_disk(fd: int, piece: memoryview) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", full_disk)
    message = r"cannot write .*/a: No space left on device. It needs 1,000 bytes, and [\d,]+ were free"
    with pytest.raises(StorageError, match=message):
        write_atomically(tmp_path / "a", bytes(1000))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(StorageError, match=r"none/a: No such file.* 3 bytes, and an unknown number were"):
        write_atomically(tmp_path / "none" / "a", b"abc")
    with pytest.raises(StorageError, match=r"cannot write .*/directory: Is a directory"):
        write_atomically(tmp_path / "directory", b"abc")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_writes_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, piece: write(fd, piece[:7]))
    write_atomically(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_bytes_then_name_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, rename = [], os.fsync, os.replace

    def observed(fd: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", observed)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    write_atomically(tmp_path / "a", b"abc")
    assert events == ["file", "rename", "directory"]
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode, "its rights are any new file's"
