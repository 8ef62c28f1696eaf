"""The spool: its run's own, empty before and gone after, within its limit and its disk."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.paging.pager import ALIGNMENT
from pipeline.paging.spool import Spool, spool_directory


def test_each_run_has_a_spool_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spool_directory(None, tmp_path / "run") == tmp_path / "run" / "spool"
    one, other = (spool_directory(tmp_path / "fast", tmp_path / name) for name in ("run", "other"))
    assert one != other
    assert one.parent == other.parent == tmp_path / "fast"
    assert one.name.startswith("secateur-")
    monkeypatch.chdir(tmp_path)
    assert spool_directory(tmp_path / "fast", Path("run")) == one


def test_what_a_crash_left_is_removed_and_so_is_all_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "spool"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "left").write_bytes(b"by a crash")
    with Spool.opened(directory, None) as spool:
        assert list(directory.iterdir()) == []
        spool.create("hidden", 1)
    assert not directory.exists()


def test_it_is_removed_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), Spool.opened(tmp_path / "spool", None) as spool:
        spool.create("hidden", 1).touch(exist_ok=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_its_room_on_the_disk_from_the_start(tmp_path: Path) -> None:
    with Spool.opened(tmp_path / "spool", None) as spool:
        path = spool.create("hidden", 100_000)
        about = path.stat()
        assert about.st_size == 25 * ALIGNMENT
        assert about.st_blocks * 512 >= about.st_size
        spool.remove(path)
        assert not path.exists()


def test_the_limit_counts_what_is_there(tmp_path: Path) -> None:
    with Spool.opened(tmp_path / "spool", 3 * ALIGNMENT) as spool:
        first = spool.create("first", ALIGNMENT + 1)
        with pytest.raises(
            StorageError,
            match=r"second needs 8,192 bytes, and 8,192 of the 12,288 bytes of memory.spool_limit are taken",
        ):
            spool.create("second", ALIGNMENT + 1)
        spool.remove(first)
        assert spool.create("second", ALIGNMENT + 1).exists()


def test_a_full_disk_shows_when_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Spool.opened(tmp_path / "spool", 4 * ALIGNMENT) as spool:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            StorageError,
            match=r"cannot make room for hidden .*: No space left on device. It needs 12,288 bytes, and [\d,]+",
        ):
            spool.create("hidden", 3 * ALIGNMENT)
        assert list(spool.directory.iterdir()) == []
        monkeypatch.undo()
        assert spool.create("hidden", 3 * ALIGNMENT).exists()  # what failed does not count


def test_a_spool_that_was_removed_meanwhile_is_an_error(tmp_path: Path) -> None:
    with Spool.opened(tmp_path / "spool", None) as spool:
        path = spool.create("first", 1)
        path.unlink()
        spool.directory.rmdir()
        with pytest.raises(
            StorageError, match=r"No such file or directory. It needs 4,096 bytes, and an unknown number"
        ):
            spool.create("second", 1)
        spool.remove(path)


def test_a_spool_that_cannot_be_made_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    way_out = "cannot make the spool .*: Not a directory; set memory.spool to a directory this user can write"
    with pytest.raises(StorageError, match=way_out), Spool.opened(tmp_path / "file" / "spool", None):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "spool").symlink_to(precious)
    with pytest.raises(StorageError, match="symbolic link"), Spool.opened(tmp_path / "spool", None):
        pass
    assert (precious / "file").exists()


@pytest.mark.parametrize("name", ["../outside", "deep/file", "/etc/file"])
def test_no_file_leaves_the_spool(tmp_path: Path, name: str) -> None:
    with Spool.opened(tmp_path / "spool", None) as spool, pytest.raises(AssertionError, match="no plain file name"):
        spool.create(name, 1)
