"""Reading and writing safetensors files, held against the format's own library."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import shards
from pipeline.errors import CheckpointError, MalformedShard, StorageError
from pipeline.header import DTYPES
from pipeline.shards import (
    OutputTensor,
    ShardReader,
    hash_file,
    header_bytes,
    read_header,
    remove_leftovers,
    tensor_chunks,
    write_atomically,
    write_shard,
)

PIECE = 64
"""The piece size of the tests that cross pieces, in bytes."""


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Finite values of any dtype, the same every time."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    return values.abs().to(dtype) if dtype != torch.bool else values > 0


def output(name: str, tensor: torch.Tensor) -> OutputTensor:
    return OutputTensor(
        name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=partial(tensor_chunks, tensor)
    )


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, NaN included."""
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
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


def test_what_is_written_the_format_s_own_library_reads(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    written = write_shard(path, [output(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(same_bytes(file.get_tensor(name), tensors[name]) for name in tensors)
    assert list(read_header(path)) == list(tensors)
    content = path.read_bytes()
    assert (written.file, written.num_bytes) == ("model.safetensors", len(content))
    assert written.sha256 == hashlib.sha256(content).hexdigest() == hash_file(path)


def test_what_the_format_s_own_library_writes_reads_back(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with ShardReader(path) as reader:
        assert reader.entries.keys() == tensors.keys()
        assert all(same_bytes(reader.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.usefixtures("small_pieces")
def test_raw_bytes_of_every_dtype_survive_reading_and_writing(code: str, tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8) if code != "BOOL" else torch.arange(256).fmod(2).byte()
    tensor = bits.view(DTYPES[code])
    save_file({"x": tensor}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader:
        assert same_bytes(reader.read("x"), tensor)
        copied = OutputTensor(
            name="x", dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=lambda: reader.chunks("x")
        )
        write_shard(tmp_path / "b", [copied])
    assert same_bytes(load_file(tmp_path / "b")["x"], tensor)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("small_pieces")
def test_reading_into_another_float_dtype_converts_every_piece(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
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


def test_reads_the_kernel_cuts_short_are_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_target_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "a")
    with (
        ShardReader(tmp_path / "a") as reader,
        pytest.raises(
            CheckpointError, match=r"'x' of .*/a has the shape \(2, 3\), and the model wants \(3, 2\)"
        ),
    ):
        reader.read_into("x", torch.empty(3, 2))


def test_packed_integers_are_never_taken_for_weights(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "a")
    with (
        ShardReader(tmp_path / "a") as reader,
        pytest.raises(
            CheckpointError, match=r"is torch.uint8, wanted as torch.float32: only floats are converted"
        ),
    ):
        reader.read_into("x", torch.empty(4))


def test_a_target_with_strides_is_a_programming_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader, pytest.raises(AssertionError, match="'x' is not contiguous"):
        reader.read_into("x", torch.empty(3, 2).T)


def test_a_closed_reader_refuses_instead_of_reading_another_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    with ShardReader(tmp_path / "a") as reader:
        pass
    with (
        (tmp_path / "a").open("rb"),
        pytest.raises(CheckpointError, match="cannot read .*Bad file descriptor"),
    ):
        reader.read("x")


def test_a_reader_closes_its_file_also_when_forgotten_or_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"?")
    before = os.listdir("/proc/self/fd")
    ShardReader(tmp_path / "a")
    with pytest.raises(MalformedShard, match="it has 1 bytes"):
        ShardReader(tmp_path / "b")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("read", [read_header, header_bytes, hash_file])
def test_a_file_that_cannot_be_read_is_named(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match="cannot read .*/none: No such file or directory; it must be"):
        read(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot read .*: Is a directory"):
        read(tmp_path)


def test_header_bytes_are_the_file_up_to_its_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [output("x", torch.ones(4))])
    assert header_bytes(tmp_path / "a") == (tmp_path / "a").read_bytes()[:-16]


@pytest.mark.usefixtures("small_pieces")
def test_bytes_of_a_tensor_come_in_small_pieces_and_uncopied() -> None:
    tensor = sample(torch.bfloat16, 10, 10)
    pieces = list(tensor_chunks(tensor))
    assert [len(piece) for piece in pieces] == [64, 64, 64, 8]
    assert torch.frombuffer(pieces[0], dtype=torch.uint8).data_ptr() == tensor.data_ptr()
    assert b"".join(pieces) == tensor.view(torch.uint8).numpy().tobytes()


def test_bytes_of_a_transposed_tensor_are_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="only a contiguous tensor's bytes lie in order"):
        next(tensor_chunks(torch.zeros(2, 3).T))


def test_tensors_are_made_one_after_another_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    def chunks(name: str) -> Iterator[memoryview]:
        events.append(f"make {name}")
        yield memoryview(b"12")
        events.append(f"done {name}")

    made = [
        OutputTensor(name=name, dtype=torch.uint8, shape=(2,), chunks=partial(chunks, name)) for name in "zab"
    ]
    assert events == []
    write_shard(tmp_path / "a", made)
    assert events == [f"{event} {name}" for name in "zab" for event in ("make", "done")]
