"""One safetensors file: positioned reads of bounded size, atomic streaming writes.

Files are read with `preadv` into a reused buffer and never mapped: the memory a read takes is known
beforehand, and a file that shrinks under us is an error with a name, not a bus error. Files are written
beside their final name and renamed when they are whole and on the disk. The format: pipeline/header.py.
"""

import hashlib
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.durable import atomic_file
from pipeline.errors import CheckpointError
from pipeline.header import TensorEntry, build_header, malformed, parse_header, read_header_bytes, replaced

__all__ = [
    "OutputTensor", "ShardReader", "TensorEntry", "WrittenShard", "hash_file", "header_bytes", "read_header",
    "tensor_chunks", "write_shard",
]  # fmt: skip

PIECE_BYTES = 16 * 2**20
"""The most bytes of a tensor that are staged at once; a multiple of every dtype's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """One tensor to be written: its shape and dtype are known before its bytes are made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[memoryview]]
    """Called once, when the tensor's turn comes; yields its bytes in order, flat. See `tensor_chunks`."""

    @property
    def num_bytes(self) -> int:
        """What `chunks` must add up to."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """The receipt of `write_shard`."""

    file: str
    """The file's name, without its directory."""
    sha256: str
    """Of the whole file, in hexadecimal."""
    num_bytes: int
    """Of the whole file, header included."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the file at `path`, by name, in file order; only the header is read.

    Raises MalformedShard for the first rule of the format broken, CheckpointError where the file cannot be read.
    """
    with ShardReader(path) as reader:
        return reader.entries


def header_bytes(path: Path) -> bytes:
    """The length prefix and the JSON as they lie in the file, unparsed; raises as `read_header` does for them."""
    with _reading(path), path.open("rb", buffering=0) as file:
        return read_header_bytes(file.fileno(), path)


class ShardReader:
    """An open safetensors file, read tensor by tensor at known offsets; a context manager.

    Holds one descriptor and one staging buffer of at most PIECE_BYTES. For one thread at a time.
    """

    entries: dict[str, TensorEntry]

    def __init__(self, path: Path) -> None:
        """Open `path` and check its header; raises as `read_header` does."""
        self.path = path
        with _reading(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._close = weakref.finalize(self, os.close, self._fd)
            self.entries = parse_header(read_header_bytes(self._fd, path), os.fstat(self._fd).st_size, path)
        self._staging = _staging(max((entry.num_bytes for entry in self.entries.values()), default=0))

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; also done when the reader is collected."""
        self._close()
        self._fd = -1  # the number may soon be another file's

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Fill `target` with the tensor, piece by piece, converting between float dtypes on the way.

        `target` is contiguous, of the tensor's shape, on any device. In the stored dtype the bytes arrive
        unchanged. Raises CheckpointError for another shape or a conversion that is not float to float,
        MalformedShard where the file has become shorter, KeyError for an unknown name.
        """
        entry = self.entries[name]
        self._check_target(entry, target)
        flat, stored = target.detach().view(-1), entry.dtype
        if target.dtype == stored:
            flat, stored = flat.view(torch.uint8), torch.uint8
        num_read = 0
        for piece in self._pieces(entry, self._staging):
            values = piece.view(stored)
            flat[num_read : num_read + values.numel()].copy_(values)
            num_read += values.numel()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU; raises as `read_into` does."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, tensor)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most PIECE_BYTES, each valid until the next is asked for.

        The buffer is this call's own, so other reads may come between. Raises as `read_into` does.
        """
        entry = self.entries[name]
        for piece in self._pieces(entry, _staging(entry.num_bytes)):
            yield piece.numpy().data.toreadonly()

    def still_there(self) -> Path:
        """The path, which still leads to the file that is open here; CheckpointError where it has been replaced."""
        with _reading(self.path):
            if not os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                raise replaced(self.path)
        return self.path

    def _check_target(self, entry: TensorEntry, target: torch.Tensor) -> None:
        assert target.is_contiguous(), f"the target of {entry.name!r} is not contiguous"
        if tuple(target.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {entry.name!r} of {self.path} has the shape {entry.shape}, and the model wants "
                f"{tuple(target.shape)}: config.json and weights must be of one model"
            )
        both_float = target.dtype.is_floating_point and entry.dtype.is_floating_point
        if target.dtype != entry.dtype and not both_float:
            raise CheckpointError(
                f"tensor {entry.name!r} of {self.path} is {entry.dtype}, wanted as {target.dtype}: only "
                "floats are converted; packed (quantised) weights must be unpacked first"
            )

    def _pieces(self, entry: TensorEntry, staging: torch.Tensor) -> Iterator[torch.Tensor]:
        """The bytes of `entry` as uint8 views of `staging`, overwritten from one piece to the next."""
        for begin in range(0, entry.num_bytes, PIECE_BYTES):
            piece = staging[: min(PIECE_BYTES, entry.num_bytes - begin)]
            self._fill(piece.numpy().data, entry.start + begin)
            yield piece

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            with _reading(self.path):
                num_read = os.preadv(self._fd, [buffer], offset)
            if num_read == 0:
                raise malformed(self.path, f"it ended at byte {offset:,}, shorter than when it was opened")
            buffer, offset = buffer[num_read:], offset + num_read


def _staging(num_bytes: int) -> torch.Tensor:
    """A page-aligned byte buffer for tensors of up to `num_bytes`, at most PIECE_BYTES.

    Memory straight from the system, and straight back when dropped: malloc would hoard a few such buffers.
    """
    return torch.frombuffer(mmap.mmap(-1, max(1, min(num_bytes, PIECE_BYTES))), dtype=torch.uint8)


def hash_file(path: Path) -> str:
    """The file's sha256 in hexadecimal, in bounded memory; CheckpointError where it cannot be read."""
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; it must be a readable file") from error


def tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous CPU tensor of any dtype, uncopied, in pieces of at most PIECE_BYTES."""
    assert tensor.is_contiguous(), "only a contiguous tensor's bytes lie in order"
    flat = tensor.detach().view(-1).view(torch.uint8).numpy()
    for begin in range(0, flat.size, PIECE_BYTES):
        yield flat[begin : begin + PIECE_BYTES].data


def write_shard(path: Path, tensors: Sequence[OutputTensor]) -> WrittenShard:
    """Write `tensors` in the order given; `path` appears whole and durable, or not at all.

    Each tensor's bytes are asked for when its turn comes, so one tensor at a time is in memory. Raises
    StorageError where the disk refuses, AssertionError where `chunks` yields another number of bytes than
    shape and dtype say, and whatever `chunks` raises; the temporary file is removed in every case.
    """
    header = build_header((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    num_bytes = len(header) + sum(tensor.num_bytes for tensor in tensors)
    digest = hashlib.sha256(header)
    with atomic_file(path, num_bytes) as write:
        write(memoryview(header))
        for tensor in tensors:
            for chunk in _exact_chunks(tensor):
                digest.update(chunk)
                write(chunk)
                del chunk  # or the whole tensor would stay in memory while the next one is made
    return WrittenShard(file=path.name, sha256=digest.hexdigest(), num_bytes=num_bytes)


def _exact_chunks(tensor: OutputTensor) -> Iterator[memoryview]:
    """The tensor's chunks as flat bytes; AssertionError (also under `python -O`) unless they add up."""
    num_bytes = 0
    for chunk in tensor.chunks():
        assert chunk.shape == (chunk.nbytes,), f"the chunks of {tensor.name!r} are not flat bytes"
        num_bytes += chunk.nbytes
        yield chunk
    if num_bytes != tensor.num_bytes:
        raise AssertionError(
            f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}, {tensor.num_bytes:,} bytes, "
            f"but its chunks held {num_bytes:,}"
        )
