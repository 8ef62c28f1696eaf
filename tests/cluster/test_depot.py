"""Files that travel in pieces: whole ones arrive, and nothing else is ever seen under their names."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from cluster.depot import Depot, fetch_file, send_file
from pipeline.durable import remove_leftovers
from pipeline.errors import StorageError

PIECE = 10
CONTENT = bytes(range(64))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A worker's own directory, with a finished shard."""
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "a.safetensors").write_bytes(CONTENT)
    return tmp_path / "node"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The coordinator's directory."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def depot(store: Path) -> Depot:
    return Depot(store)


def write_all(depot: Depot, file: str, content: bytes) -> None:
    for offset in range(0, len(content), PIECE):
        depot.write(file, offset, content[offset : offset + PIECE], len(content))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_file_is_sent_and_fetched_in_small_pieces(node: Path, store: Path, depot: Depot) -> None:
    sent, fetched = [], []

    def write(file: str, offset: int, piece: bytes, num_bytes: int) -> None:
        assert "a.safetensors" not in contents(store)
        sent.append((offset, len(piece)))
        depot.write(file, offset, piece, num_bytes)

    def read(file: str, offset: int, num_bytes: int) -> bytes:
        fetched.append((offset, num_bytes))
        return depot.read(file, offset, num_bytes)

    send_file(node / "a.safetensors", SHA256, len(CONTENT), write, depot.finish, PIECE)
    assert contents(store) == {"a.safetensors": CONTENT}
    (node / "back").mkdir()
    fetch_file(read, node / "back" / "a.safetensors", SHA256, len(CONTENT), PIECE)
    assert contents(node / "back") == {"a.safetensors": CONTENT}
    assert sent == fetched == [(0, 10), (10, 10), (20, 10), (30, 10), (40, 10), (50, 10), (60, 4)]


def test_files_that_arrive_at_once_do_not_mix(store: Path, depot: Depot) -> None:
    files = {"a": CONTENT, "b": CONTENT[::-1], "c": CONTENT[:30]}
    for offset in range(0, len(CONTENT), PIECE):
        for file, content in files.items():
            if offset < len(content):
                depot.write(file, offset, content[offset : offset + PIECE], len(content))
    for file, content in files.items():
        depot.finish(file, hashlib.sha256(content).hexdigest())
    assert contents(store) == files


def test_an_interrupted_transfer_is_begun_anew(store: Path, depot: Depot) -> None:
    depot.write("a", 0, b"of a sender that died", len(CONTENT))
    (interrupted,) = contents(store)
    write_all(depot, "a", CONTENT)
    assert interrupted not in contents(store)
    depot.finish("a", SHA256)
    assert contents(store) == {"a": CONTENT}


def test_a_file_sent_a_second_time_replaces_the_first_when_it_is_whole(store: Path, depot: Depot) -> None:
    (store / "a").write_bytes(b"first")
    write_all(depot, "a", CONTENT)
    assert contents(store)["a"] == b"first"
    depot.finish("a", SHA256)
    assert contents(store) == {"a": CONTENT}


def test_a_piece_that_is_not_due_is_refused_and_disturbs_nothing(store: Path, depot: Depot) -> None:
    with pytest.raises(StorageError, match="a piece of a begins at byte 10, but byte 0 is due: another sender has"):
        depot.write("a", 10, b"late", 64)
    write_all(depot, "a", CONTENT[:50])
    for offset in (40, 60):
        with pytest.raises(StorageError, match=f"begins at byte {offset}, but byte 50 is due: .* from its beginning"):
            depot.write("a", offset, b"of another sender", 64)
    depot.write("a", 50, CONTENT[50:], 50)
    with pytest.raises(StorageError, match="has not arrived as it was written: 64 of 50 bytes"):
        depot.finish("a", SHA256)


def test_pieces_that_were_not_due_leave_the_file_as_sent(store: Path, depot: Depot) -> None:
    write_all(depot, "a", CONTENT)
    with pytest.raises(StorageError, match="but byte 64 is due"):
        depot.write("a", 10, CONTENT[10:20], 64)
    depot.finish("a", SHA256)
    assert contents(store) == {"a": CONTENT}


@pytest.mark.parametrize(
    ("arrived", "found"),
    [
        (CONTENT[:-1], "63 of 64 bytes"),
        (CONTENT + b"1", "65 of 64 bytes"),
        (CONTENT[:-1] + b"1", f"64 of 64 bytes, with the sha256 [0-9a-f]{{64}} instead of {SHA256}"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused_and_removed(
    arrived: bytes, found: str, store: Path, depot: Depot
) -> None:
    depot.write("a", 0, arrived, len(CONTENT))
    message = f"/a has not arrived as it was written: {found}.* Nothing of it was kept"
    with pytest.raises(StorageError, match=message):
        depot.finish("a", SHA256)
    assert contents(store) == {}
    with pytest.raises(StorageError, match="/a cannot be finished: nothing of it is arriving; send the file"):
        depot.finish("a", SHA256)


def test_a_shard_damaged_after_it_was_written_does_not_arrive(node: Path, store: Path, depot: Depot) -> None:
    for damaged in (CONTENT[::-1], CONTENT[:40]):
        (node / "a.safetensors").write_bytes(damaged)
        with pytest.raises(StorageError, match=f"{len(damaged)} of 64 bytes"):
            send_file(node / "a.safetensors", SHA256, len(CONTENT), depot.write, depot.finish, PIECE)
    assert contents(store) == {}


def test_a_shard_damaged_in_the_depot_is_not_fetched(node: Path, store: Path, depot: Depot) -> None:
    (node / "b").write_bytes(b"old")
    for damaged in (CONTENT[::-1], CONTENT[:40]):
        (store / "b").write_bytes(damaged)
        with pytest.raises(StorageError, match=f"node/b has not arrived as it was written: {len(damaged)} of 64 bytes"):
            fetch_file(depot.read, node / "b", SHA256, len(CONTENT), PIECE)
    assert contents(node) == {"a.safetensors": CONTENT, "b": b"old"}


def test_a_depot_that_dies_while_a_file_is_fetched_leaves_nothing_behind(node: Path) -> None:
    def read(file: str, offset: int, num_bytes: int) -> bytes:
        if offset:
            raise ConnectionError("the depot's node is gone")
        return CONTENT[:num_bytes]

    with pytest.raises(ConnectionError, match="gone") as raised:
        fetch_file(read, node / "b", SHA256, len(CONTENT), PIECE)
    assert raised.tb is not None, "and nothing of it hangs on the error"
    assert list(contents(node)) == ["a.safetensors"]


def test_a_full_disk_is_named_and_the_file_can_be_sent_again(
    store: Path, depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(fd: int, piece: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    depot.write("a", 0, CONTENT[:PIECE], len(CONTENT))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        with pytest.raises(
            StorageError, match=r"cannot write .*/a: No space left on device. It needs 64 bytes, and [\d,]+ were"
        ):
            depot.write("a", PIECE, CONTENT[PIECE:], len(CONTENT))
    assert contents(store) == {}
    write_all(depot, "a", CONTENT)
    depot.finish("a", SHA256)
    assert contents(store) == {"a": CONTENT}


def test_what_cannot_be_read_is_named(node: Path, depot: Depot) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/store/none: No such file or directory; it was finished"):
        depot.read("none", 0, PIECE)
    with pytest.raises(StorageError, match=r"cannot read .*/node/none: No such file"):
        send_file(node / "none", SHA256, 64, depot.write, depot.finish, PIECE)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/etc/a", "b/a", "a/..", ".a", ".a.0badcafe.tmp", "-a", "a\n", "a\0", "a b", "ä"]
)
def test_no_name_leads_out_of_the_directory_or_to_what_is_hidden(name: str, tmp_path: Path, depot: Depot) -> None:
    (tmp_path / "a").write_bytes(b"not in the depot")
    before = sorted(tmp_path.rglob("*"))
    for asked in (
        lambda: depot.write(name, 0, b"x", 1),
        lambda: depot.finish(name, SHA256),
        lambda: depot.read(name, 0, 1),
    ):
        with pytest.raises(StorageError, match=r"is no file of .*/store: a name has only letters, digits"):
            asked()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a").read_bytes() == b"not in the depot"


def test_what_a_depot_that_died_was_taking_in_is_a_leftover_like_any_other(store: Path) -> None:
    depot = Depot(store)
    depot.write("a", 0, CONTENT[:PIECE], len(CONTENT))
    assert len(contents(store)) == 1
    remove_leftovers(store)
    assert contents(store) == {}


def test_a_file_is_on_the_disk_before_it_has_its_name(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    write_all(depot, "a", CONTENT)
    assert events == []
    depot.finish("a", SHA256)
    assert events == ["fsync", "rename", "fsync"]
