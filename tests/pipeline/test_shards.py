"""Reading and writing safetensors files, held against the format's own library."""

import errno
import hashlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import shards
from pipeline.durable import remove_leftovers
from pipeline.errors import CheckpointError, MalformedShard, StorageError
from pipeline.header import DTYPES
from pipeline.shards import OutputTensor, ShardReader, tensor_chunks, write_shard

Tensors = dict[str, torch.Tensor]

PIECE = 64
"""The piece size of the tests that cross pieces, in bytes."""


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """The same values every time, about half of them 0, in any dtype."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).relu().to(dtype)


def output(name: str, tensor: torch.Tensor) -> OutputTensor:
    chunks = partial(tensor_chunks, tensor)
    return OutputTensor(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=chunks)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, NaN included."""
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


@pytest.fixture
def tensors() -> Tensors:
    """The dtypes and shapes of the golden tests: odd sizes too, so that later tensors lie unaligned."""
    return {
        "flags": sample(torch.bool, 3),
        "single": sample(torch.float32, 5, 7),
        "brain": sample(torch.bfloat16, 4, 3, 2),
        "half": sample(torch.float16, 9),
        "count": sample(torch.int64, 2),
        "scalar": sample(torch.float32),
        "empty": sample(torch.float32, 0, 3),
    }


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", PIECE)


def test_the_format_s_own_library_reads_what_is_written(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = write_shard(path, [output(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(same_bytes(file.get_tensor(name), tensors[name]) for name in tensors)
    assert list(shards.read_header(path)) == list(tensors)
    content = path.read_bytes()
    assert (written.file, written.num_bytes) == ("model.safetensors", len(content))
    assert written.sha256 == hashlib.sha256(content).hexdigest() == shards.hash_file(path)


def test_what_the_format_s_own_library_wrote_is_read(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with ShardReader(path) as reader:
        assert reader.entries.keys() == tensors.keys()
        assert all(same_bytes(reader.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.usefixtures("small_pieces")
def test_raw_bytes_of_every_dtype_survive_reading_and_writing(code: str, tmp_path: Path) -> None:
    tensor = torch.arange(256, dtype=torch.uint8).view(DTYPES[code])
    save_file({"x": tensor}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader:
        assert same_bytes(reader.read("x"), tensor)
        write_shard(tmp_path / "b", [replace(output("x", tensor), chunks=partial(reader.chunks, "x"))])
    assert same_bytes(load_file(tmp_path / "b")["x"], tensor)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.usefixtures("small_pieces")
def test_floats_are_converted(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    tensor = sample(stored, 13, 11)
    save_file({"x": tensor}, tmp_path / "a")
    parameter = torch.nn.Parameter(torch.zeros(13, 11, dtype=wanted))
    with ShardReader(tmp_path / "a") as reader:
        reader.read_into("x", parameter)
    assert torch.equal(parameter, tensor.to(wanted))


@pytest.mark.usefixtures("small_pieces")
def test_reads_go_through_one_small_aligned_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": sample(torch.float32, 1000), "y": sample(torch.bfloat16, 33)}, tmp_path / "a")
    preadv, sizes, addresses = os.preadv, [], set()

    def observed(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        addresses.add(torch.frombuffer(buffers[0], dtype=torch.uint8).data_ptr())
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", observed)
    with ShardReader(tmp_path / "a") as reader:
        reader.read_into("x", torch.empty(1000))
        reader.read_into("y", torch.empty(33))
    assert max(sizes) == PIECE
    assert sum(sizes) == 4066
    assert len(addresses) == 1
    assert addresses.pop() % 64 == 0


@pytest.mark.usefixtures("small_pieces")
def test_chunks_stay_valid_while_other_tensors_are_read(tmp_path: Path) -> None:
    x, y = sample(torch.float32, 100), sample(torch.float32, 50)
    save_file({"x": x, "y": y}, tmp_path / "a")
    joined = b""
    with ShardReader(tmp_path / "a") as reader:
        for chunk in reader.chunks("x"):
            assert torch.equal(reader.read("y"), y)
            assert len(chunk) <= PIECE
            joined += chunk
    assert joined == x.numpy().tobytes()


def test_reads_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, preadv = sample(torch.float32, 50), os.preadv
    save_file({"x": tensor}, tmp_path / "a")
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    with ShardReader(tmp_path / "a") as reader:
        assert torch.equal(reader.read("x"), tensor)


def test_a_file_that_shrinks_while_open_is_malformed(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader:
        os.truncate(tmp_path / "a", 200)
        with pytest.raises(MalformedShard, match="it ended at byte 200, shorter than when it was opened"):
            reader.read("x")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.empty(3, 2), CheckpointError, r"'x' of .* the shape \(2, 3\), and the model wants \(3, 2\)"),
        (torch.empty(2, 3), CheckpointError, r"is torch.uint8, wanted as torch.float32: only floats are"),
        (torch.empty(3, 2).T, AssertionError, "the target of 'x' is not contiguous"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(
    target: torch.Tensor, error: type[Exception], message: str, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(2, 3, dtype=torch.uint8)}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader, pytest.raises(error, match=message):
        reader.read_into("x", target)


def test_a_closed_reader_refuses_instead_of_reading_another_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader:
        pass
    with (tmp_path / "a").open(), pytest.raises(CheckpointError, match=r"cannot read .*Bad file descr"):
        reader.read("x")


def test_a_reader_closes_its_file_also_when_forgotten_or_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"?")
    before = os.listdir("/proc/self/fd")
    ShardReader(tmp_path / "a")
    with pytest.raises(MalformedShard, match="it has 1 bytes"):
        ShardReader(tmp_path / "b")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("small_pieces")
def test_bytes_of_a_tensor_come_in_small_pieces_and_uncopied() -> None:
    tensor = sample(torch.bfloat16, 10, 10)
    pieces = list(tensor_chunks(tensor))
    assert [len(piece) for piece in pieces] == [64, 64, 64, 8]
    assert torch.frombuffer(pieces[0], dtype=torch.uint8).data_ptr() == tensor.data_ptr()
    assert b"".join(pieces) == tensor.view(torch.uint8).numpy().tobytes()
    with pytest.raises(AssertionError, match="only a contiguous tensor's bytes lie in order"):
        next(tensor_chunks(torch.zeros(2, 3).T))


def made(name: str, *pieces: bytes) -> OutputTensor:
    """A tensor of two bytes, made of `pieces`."""
    return OutputTensor(name=name, dtype=torch.uint8, shape=(2,), chunks=lambda: map(memoryview, pieces))


def test_each_tensor_is_made_when_its_turn_comes(tmp_path: Path) -> None:
    events = []

    def chunks(name: str) -> Iterator[memoryview]:
        events.append(f"make {name}")
        yield memoryview(b"12")
        events.append(f"done {name}")

    write_shard(tmp_path / "a", [replace(made(name), chunks=partial(chunks, name)) for name in "zab"])
    assert events == [f"{event} {name}" for name in "zab" for event in ("make", "done")]


def test_each_tensor_is_gone_when_the_next_one_is_made(tmp_path: Path) -> None:
    made_before: list[weakref.ref[Any]] = []

    def chunks() -> Iterator[memoryview]:
        assert all(before() is None for before in made_before)
        kept = torch.zeros(2, dtype=torch.uint8).numpy()
        made_before.append(weakref.ref(kept))
        yield kept.data

    write_shard(tmp_path / "a", [replace(made(name), chunks=chunks) for name in "zab"])
    assert len(made_before) == 3


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"1"], r"'x' is torch.uint8 \(2,\), 2 bytes, but its chunks held 1"),
        ([b"12", b"3"], r"'x' is torch.uint8 \(2,\), 2 bytes, but its chunks held 3"),
        ([torch.zeros(2, 1, dtype=torch.uint8).numpy().data], "the chunks of 'x' are not flat bytes"),
    ],
)
def test_chunks_that_are_not_the_tensor_leave_the_old_file_and_no_other(
    pieces: list[bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(AssertionError, match=message):
        write_shard(tmp_path / "a", [made("w", b"12"), made("x", *pieces)])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def full_disk(fd: int, piece: memoryview) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(StorageError, match=r"No space left on device. It needs 98 bytes, and"):
        write_shard(tmp_path / "a", [made("w", b"12")])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_midway_leaves_nothing_that_cannot_be_removed(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            write_shard(tmp_path / "a", [made("w", b"12"), replace(made("x"), chunks=lambda: os._exit(9))])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    (tmp_path / "model.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.tmp"]
