"""What a safetensors file says about itself: the header, parsed, checked and built.

    8 bytes     the JSON's length H, little-endian
    H bytes     JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}, offsets from byte 8 + H on
    the rest    the tensors' bytes, row-major, little-endian, one after another without a hole

Headers come from strangers: every rule of the format is checked before a byte of one is trusted.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError, MalformedShard

MAX_HEADER_BYTES = 100_000_000
"""A longer header is refused, as the format's own library does: a broken length must not exhaust memory."""

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
"""The format's codes for dtypes of whole bytes, those this torch has (older ones lack F8_E8M0)."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in one file."""

    name: str
    dtype: torch.dtype
    """As stored."""
    shape: tuple[int, ...]
    start: int
    """Byte offset from the beginning of the file."""
    num_bytes: int


def read_header_bytes(fd: int, path: Path) -> bytes:
    """The length prefix and the JSON of an open file, as they lie there.

    Raises MalformedShard for an impossible length, naming `path`.
    """
    file_size = os.fstat(fd).st_size
    if file_size < 8:
        raise malformed(path, f"it has {file_size} bytes, and the header's length alone takes 8")
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise malformed(path, f"it announces a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} may be")
    if length > file_size - 8:
        raise malformed(
            path,
            f"it announces a header of {length:,} bytes, and {file_size - 8:,} bytes follow: it is cut short",
        )
    return prefix + os.pread(fd, length, 8)


def parse_header(header: bytes, file_size: int, path: Path) -> dict[str, TensorEntry]:
    """The tensors that `header` (length prefix and JSON) declares, by name, in file order, all rules checked.

    `__metadata__` is skipped. Raises MalformedShard for the first rule broken, naming `path`.
    """
    try:
        tensors = json.loads(header[8:].decode("utf-8"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"its header is not JSON with unique names ({error})") from error
    if not isinstance(tensors, dict):
        raise malformed(path, f"its header is a JSON {type(tensors).__name__}, not an object")
    tensors.pop("__metadata__", None)
    entries = [_parse_entry(name, fields, len(header), path) for name, fields in tensors.items()]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    _check_layout(entries, len(header), file_size, path)
    return {entry.name: entry for entry in entries}


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; ValueError for a repeated name or one that is no valid text."""
    names: dict[str, Any] = {}
    for name, value in pairs:
        name.encode("utf-8")  # a lone surrogate, legal in JSON, could be neither printed nor written
        if name in names:
            raise ValueError(f"{name!r} appears twice")
        names[name] = value
    return names


def _parse_entry(name: str, fields: Any, data_start: int, path: Path) -> TensorEntry:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise malformed(path, f"tensor {name!r} lacks a dtype, a shape or data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise malformed(path, f"tensor {name!r} has the unknown dtype {code!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise malformed(path, f"tensor {name!r} has the shape {shape!r}; it must list sizes, none negative")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise malformed(path, f"tensor {name!r} has data_offsets {offsets!r}; they must be two offsets, none negative")
    begin, end = offsets
    num_bytes = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != num_bytes:
        raise malformed(
            path,
            f"tensor {name!r} is {code} {shape}, {num_bytes:,} bytes, but its offsets span {end - begin:,}",
        )
    return TensorEntry(name=name, dtype=DTYPES[code], shape=tuple(shape), start=data_start + begin, num_bytes=num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(entries: list[TensorEntry], data_start: int, file_size: int, path: Path) -> None:
    """Tensors must follow one another from `data_start` to the file's last byte."""
    end = data_start
    for entry in entries:
        if entry.start < end:
            raise malformed(path, f"tensor {entry.name!r} overlaps the one before it by {end - entry.start:,} bytes")
        if entry.start > end:
            raise malformed(path, f"a hole of {entry.start - end:,} bytes lies before tensor {entry.name!r}")
        end += entry.num_bytes
    if end > file_size:
        raise malformed(path, f"its tensors need {end:,} bytes, and it has {file_size:,}: it is cut short")
    if end < file_size:
        raise malformed(path, f"{file_size - end:,} bytes lie after its last tensor")


def malformed(path: Path, fact: str) -> MalformedShard:
    """The error for a file that breaks the format: `fact` completes the sentence."""
    return MalformedShard(f"{path} is not a sound safetensors file: {fact}. Fetch or write it again.")


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length prefix and JSON for (name, dtype, shape) laid out in that order, metadata `{"format": "pt"}`.

    Padded with spaces, so that the tensors begin at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        assert name not in header, f"two tensors are named {name!r}"
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (begin, end)}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def replaced(path: Path) -> CheckpointError:
    """Return the error of a file that is another one than the file whose header was checked."""
    return CheckpointError(
        f"{path} has been replaced since the checkpoint was opened; while a run reads it, its source must stay as it "
        "is: start again"
    )
