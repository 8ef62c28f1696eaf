"""The header of a safetensors file: each rule of the format; any other bytes parse or are refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, MalformedShard
from pipeline.header import build_header
from pipeline.shards import ShardReader, header_bytes, read_header


def fields(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_bytes(header: object, data: bytes) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


PAIR: dict[str, Any] = {"a": fields("F32", [2], [0, 8]), "b": fields("BF16", [3, 1], [8, 14])}
VALID = file_bytes({"__metadata__": {"format": "pt"}} | PAIR, bytes(range(14)))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path, written anew by every example."""
    return tmp_path_factory.mktemp("header") / "x.safetensors"


def test_entries_come_in_the_order_of_the_file_with_absolute_offsets(scratch: Path) -> None:
    header = {"late": fields("I64", [1], [4, 12]), "empty": fields("F16", [0, 7], [4, 4])}
    scratch.write_bytes(file_bytes(header | {"early": fields("F32", [], [0, 4])}, bytes(12)))
    entries = read_header(scratch)
    data_start = scratch.stat().st_size - 12
    assert list(entries) == ["early", "empty", "late"]
    assert entries["early"].shape == ()
    assert (entries["empty"].start, entries["empty"].num_bytes) == (data_start + 4, 0)
    assert (entries["late"].dtype, entries["late"].start) == (torch.int64, data_start + 4)


def test_a_file_without_tensors_parses(scratch: Path) -> None:
    scratch.write_bytes(file_bytes({}, b""))
    assert read_header(scratch) == {}


def test_unknown_keys_are_ignored_as_the_format_s_library_does(scratch: Path) -> None:
    scratch.write_bytes(file_bytes({"a": fields("U8", [1], [0, 1]) | {"note": None}}, b"x"))
    assert list(read_header(scratch)) == ["a"]


def one(dtype: object, shape: object, offsets: object, data: bytes = b"x") -> bytes:
    """A file of a single tensor `a`."""
    return file_bytes({"a": fields(dtype, shape, offsets)}, data)


def pair_with_second_at(begin: int) -> bytes:
    """VALID's tensors, the second one (6 bytes) moved to another offset."""
    return file_bytes(PAIR | {"b": fields("BF16", [3, 1], [begin, begin + 6])}, bytes(begin + 6))


TWICE = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}'

REFUSED = {
    "shorter than its length": (b"1234567", "it has 7 bytes, and the header's length alone takes 8"),
    "header over the limit": (
        (10**8 + 1).to_bytes(8, "little"),
        "a header of 100,000,001 bytes; at most 100",
    ),
    "header of the limit": ((10**8).to_bytes(8, "little"), "of 100,000,000 bytes, and 0 bytes follow"),
    "header longer than file": (VALID[:50], "bytes, and 42 bytes follow: it is cut short"),
    "not text": (file_bytes(b"\xff\xfe", b""), "not JSON with unique names"),
    "not JSON": (file_bytes(b"{", b""), "not JSON with unique names"),
    "JSON too deep": (file_bytes(b"[" * 200_000, b""), "not JSON with unique names"),
    "a number too long": (file_bytes(b"9" * 5000, b""), "not JSON with unique names"),
    "not an object": (file_bytes([PAIR], b""), "its header is a JSON list, not an object"),
    "a name twice": (file_bytes(TWICE, b"x"), "not JSON with unique names .'a' appears twice"),
    "a name that is no text": (file_bytes(b'{"\\ud800": 1}', b""), "not JSON with unique names .*surrogate"),
    "a tensor that is no object": (file_bytes({"a": 1}, b""), "'a' lacks a dtype, a shape or data_offsets"),
    "a key missing": (file_bytes({"a": {"dtype": "U8", "shape": []}}, b""), "'a' lacks a dtype, a shape or"),
    "unknown dtype": (one("F4", [2], [0, 1]), "'a' has the unknown dtype 'F4'; known are F64, F32"),
    "dtype that is no text": (one(["F32"], [1], [0, 4]), "'a' has the unknown dtype .'F32'.; known are"),
    "negative size": (one("U8", [-1], [0, 1]), r"has the shape \[-1\]; it must list sizes, none negative"),
    "size that is no integer": (one("U8", [1.0], [0, 1]), r"has the shape \[1.0\]; it must list sizes"),
    "size that is a bool": (one("U8", [True], [0, 1]), r"has the shape \[True\]; it must list sizes"),
    "shape that is no list": (one("U8", 1, [0, 1]), "has the shape 1; it must list sizes"),
    "shape over 64 bits": (one("U8", [2**62, 4, 0], [0, 0], b""), "it must list sizes"),
    "negative offset": (
        one("U8", [1], [-1, 0]),
        r"data_offsets \[-1, 0\]; they must be two .* none negative",
    ),
    "three offsets": (one("U8", [1], [0, 1, 1]), "they must be two offsets"),
    "offsets over 64 bits": (one("U8", [1], [2**63 - 1, 2**63]), "they must be two offsets"),
    "offsets backwards": (one("U8", [1], [1, 0]), "1 bytes, but its offsets span -1"),
    "size not dtype x shape": (one("F32", [3], [0, 8], bytes(8)), r"F32 \[3\], 12 bytes, but .* span 8"),
    "overlap": (pair_with_second_at(6), "'b' overlaps the one before it by 2 bytes"),
    "hole": (pair_with_second_at(10), "a hole of 2 bytes lies before tensor 'b'"),
    "hole before the first": (one("U8", [1], [1, 2], b"xy"), "a hole of 1 bytes lies before tensor 'a'"),
    "far out of range": (one("U8", [1], [10**15, 10**15 + 1]), "a hole of 1,000,000,000,000,000 bytes"),
    "cut short": (VALID[:-3], f"need {len(VALID)} bytes, and it has {len(VALID) - 3}: it is cut short"),
    "trailing": (VALID + b"??", "2 bytes lie after its last tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_breaks_a_rule_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(MalformedShard, match=rf"broken.safetensors is not a sound safetensors file: .*{message}"):
        read_header(path)


@pytest.mark.parametrize("read", [read_header, header_bytes])
def test_a_file_that_cannot_be_read_is_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*/none: No such file or directory; it must be"):
        read(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        read(tmp_path)


def test_header_bytes_are_the_file_up_to_its_tensors(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    assert header_bytes(scratch) == VALID[:-14]


def parses_wholly_or_is_refused(path: Path, content: bytes) -> None:
    """The law of both fuzzers: MalformedShard and nothing else, or entries that tile the file."""
    path.write_bytes(content)
    try:
        reader = ShardReader(path)
    except MalformedShard:
        return
    with reader:
        end = 8 + int.from_bytes(content[:8], "little")
        for entry in reader.entries.values():
            assert entry.start == end
            assert entry.num_bytes == math.prod(entry.shape) * entry.dtype.itemsize
            assert reader.read(entry.name).shape == entry.shape
            end += entry.num_bytes
        assert end == len(content)


EDITS = st.lists(
    st.tuples(st.integers(0, len(VALID)), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4
)


@given(EDITS)
@settings(max_examples=300, deadline=None)
def test_random_edits_of_a_valid_file_parse_or_are_refused(scratch: Path, edits: list[tuple[int, int, bytes]]) -> None:
    content = VALID
    for position, num_removed, inserted in edits:
        content = content[:position] + inserted + content[position + num_removed :]
    parses_wholly_or_is_refused(scratch, content)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from([-1, 0, 1, 8, 14, 2**63, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
SLOTS = [("a",), ("b",), ("__metadata__",), *((name, key) for name in PAIR for key in fields(0, 0, 0))]


@given(st.sampled_from(SLOTS), JSON)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_in_a_header_parses_or_is_refused(
    scratch: Path, slot: tuple[str, ...], value: object
) -> None:
    header = json.loads(json.dumps(PAIR))
    place = header[slot[0]] if len(slot) == 2 else header
    place[slot[-1]] = value
    parses_wholly_or_is_refused(scratch, file_bytes(header, bytes(14)))


def test_a_built_header_is_padded_so_that_tensors_begin_at_a_multiple_of_8() -> None:
    for name in ("a", "ab", "schön", "x" * 9):
        header = build_header([(name, torch.float32, (2, 3)), ("z", torch.bool, ())])
        assert len(header) % 8 == 0
        assert json.loads(header[8:]) == {
            "__metadata__": {"format": "pt"},
            name: fields("F32", [2, 3], [0, 24]),
            "z": fields("BOOL", [], [24, 25]),
        }


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_name_is_written_once(name: str) -> None:
    with pytest.raises(AssertionError, match=f"two tensors are named '{name}'"):
        build_header([("a", torch.int8, ()), (name, torch.int8, ())])
