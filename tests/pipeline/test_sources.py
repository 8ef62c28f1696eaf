"""Sources: which mapping is which, and what each gives or says when it cannot."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file

from pipeline.errors import CalibrationError
from pipeline.sources import (
    Arrow,
    Hub,
    JsonLines,
    Parquet,
    Source,
    SourceField,
    TextFile,
    TokensFile,
    describe,
    documents,
    token_ids,
)

ROWS = ["The first row.", "Zweite Zeile: äöü.", "", "四"]


class Holder(BaseModel):
    """A config model with a source in it."""

    source: SourceField


def parsed(text: str) -> Source:
    return Holder.model_validate({"source": yaml.safe_load(text)}).source


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path: Path, table: datasets.Dataset) -> None:
    table.save_to_disk(path.with_suffix(".directory"))
    (path.with_suffix(".directory") / "data-00000-of-00001.arrow").rename(path)


@pytest.fixture
def num_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """A cache of its own for `datasets`, and how many files it left there."""
    cache = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return lambda: sum(path.is_file() for path in cache.rglob("*"))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("embedded", "embedded"),
        ("{text: a.txt}", TextFile(text=Path("a.txt"))),
        ("{jsonl: a.jsonl}", JsonLines(jsonl=Path("a.jsonl"), field="text")),
        ("{jsonl: a.jsonl, field: body}", JsonLines(jsonl=Path("a.jsonl"), field="body")),
        ("{parquet: a.parquet, field: body}", Parquet(parquet=Path("a.parquet"), field="body")),
        ("{arrow: a.arrow}", Arrow(arrow=Path("a.arrow"))),
        (
            "{hub: a/b, revision: c, config: en, split: test}",
            Hub(hub="a/b", revision="c", config="en", split="test"),
        ),
        ("{tokens: a.safetensors}", TokensFile(tokens=Path("a.safetensors"))),
    ],
)
def test_the_one_kind_key_decides_what_a_mapping_is(text: str, source: Source) -> None:
    assert parsed(text) == source
    assert Holder(source=source).source == source


@pytest.mark.parametrize(
    "text", ["corpus.txt", "{}", "{field: text}", "{text: a.txt, jsonl: a.jsonl}", "3", "null", "[embedded]"]
)
def test_what_is_no_source_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValidationError, match=r"the word embedded, or a mapping with exactly one of the keys text, "):
        parsed(text)


def test_a_key_that_a_kind_does_not_have_is_an_error() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        parsed("{text: a.txt, field: body}")


def test_a_source_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(TextFile(text=Path("a.txt")), "text", Path("b.txt"))  # noqa: B010


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (TextFile(text=Path("a.txt")), "{text: a.txt}"),
        (Hub(hub="a/b", revision="c"), "{hub: a/b, revision: c, split: train, field: text}"),
    ],
)
def test_a_source_is_described_as_yaml_writes_it(source: Source, line: str) -> None:
    assert describe(source) == line


def test_the_description_of_the_embedded_text_names_the_python_it_comes_from() -> None:
    assert describe("embedded").endswith(f"of Python {sys.version.split()[0]})")


def test_the_embedded_text_is_every_documentation_topic_in_order_of_its_name() -> None:
    (text,) = documents("embedded")
    first, last = min(topics), max(topics)
    assert text.startswith(topics[first])
    assert text.endswith(topics[last])
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)


def test_a_python_without_documentation_topics_is_told_to_name_a_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match=r"without its documentation topics.*name a source"):
        list(documents("embedded"))


def test_a_text_file_is_one_document_with_its_line_ends_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("één\r\ntwee\n".encode())
    assert list(documents(TextFile(text=tmp_path / "a.txt"))) == ["één\r\ntwee\n"]


def test_a_file_that_is_not_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text: byte 3 \(0xe9\).*convert the file"):
        list(documents(TextFile(text=tmp_path / "a.txt")))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that even root cannot read from its start")
def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"/proc/self/mem cannot be read: .*make it readable"):
        list(documents(TextFile(text=Path("/proc/self/mem"))))


def test_a_missing_file_is_named_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gone = Path("gone")
    text_sources = (TextFile(text=gone), JsonLines(jsonl=gone), Parquet(parquet=gone), Arrow(arrow=gone))
    for source in text_sources:
        with pytest.raises(CalibrationError, match=f"there is no file {tmp_path}/gone; name an existing file"):
            list(documents(source))
    with pytest.raises(CalibrationError, match=f"there is no file {tmp_path}/gone"):
        token_ids(TokensFile(tokens=gone))


def test_every_file_of_rows_gives_the_same_documents_in_order(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"body": ROWS, "id": list(range(len(ROWS)))})
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    assert list(documents(JsonLines(jsonl=tmp_path / "a.jsonl", field="body"))) == ROWS
    assert list(documents(Parquet(parquet=tmp_path / "a.parquet", field="body"))) == ROWS
    assert list(documents(Arrow(arrow=tmp_path / "a.arrow", field="body"))) == ROWS


def test_a_name_with_pattern_characters_is_that_file_and_no_pattern(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a1.jsonl", [{"text": "the wrong file"}])
    path = write_jsonl(tmp_path / "a[1]*.jsonl", [{"text": "the right file"}])
    assert list(documents(JsonLines(jsonl=path))) == ["the right file"]


def test_reading_a_local_file_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cached: Callable[[], int]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "row"}])
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    assert list(documents(JsonLines(jsonl=path))) == ["row"]
    assert list((tmp_path / "working").iterdir()) == []
    assert num_cached() == 0


@pytest.mark.usefixtures("num_cached")
def test_a_hub_source_may_be_a_local_directory_of_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"body": "of train"}])
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"body": "of test"}])
    directory = str(tmp_path / "data")
    assert list(documents(Hub(hub=directory, field="body"))) == ["of train"]
    assert list(documents(Hub(hub=directory, field="body", split="test"))) == ["of test"]
    with pytest.raises(CalibrationError, match=r"cannot be read: ValueError: Bad split: nope.*check the name"):
        list(documents(Hub(hub=directory, field="body", split="nope")))
    with pytest.raises(CalibrationError, match=r"cannot be read: ValueError: BuilderConfig 'nope' not found"):
        list(documents(Hub(hub=directory, field="body", config="nope")))


def test_a_missing_field_is_answered_with_the_fields_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "a", "body": "b"}])
    with pytest.raises(CalibrationError, match=r"row 0 of .*has no field 'text'; its fields are \['body', 'title'\]"):
        list(documents(JsonLines(jsonl=path)))


def test_a_row_without_text_in_the_field_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(CalibrationError, match=r"field 'text' of row 1 of .*holds NoneType, not text"):
        list(documents(JsonLines(jsonl=path)))


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{"text": \n', b'{"text": "caf\xe9"}\n'])
def test_rows_that_cannot_be_parsed_are_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"\{jsonl: .*a\.jsonl.* cannot be read: .*check the name, the format"):
        list(documents(JsonLines(jsonl=tmp_path / "a.jsonl")))


def test_an_empty_file_of_rows_is_said_to_hold_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(CalibrationError, match=r"a\.jsonl.* holds no rows; name a file or a split that has some"):
        list(documents(JsonLines(jsonl=tmp_path / "a.jsonl")))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16])
@pytest.mark.parametrize("name", ["tokens", "whatever"])
def test_token_ids_of_any_integer_type_are_read_as_int64(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save_file({name: torch.arange(6).to(dtype).view(2, 3)}, tmp_path / "a.safetensors")
    ids = token_ids(TokensFile(tokens=tmp_path / "a.safetensors"))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_among_several_tensors_the_one_named_tokens_is_taken(tmp_path: Path) -> None:
    save_file({"mask": torch.zeros(4), "tokens": torch.arange(4)}, tmp_path / "a.safetensors")
    assert token_ids(TokensFile(tokens=tmp_path / "a.safetensors")).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tensors", [{}, {"ids": torch.arange(4), "mask": torch.zeros(4)}])
def test_a_file_without_one_tensor_to_take_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match=r"holds the tensors \[.*\]; name the one of token ids `tokens`"):
        token_ids(TokensFile(tokens=tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(1, 2, 3).int(),
    ],
)
def test_tensors_that_hold_no_token_ids_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_file({"tokens": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match=r"is torch\..* of shape \[.*\]; token ids are integers of shape"):
        token_ids(TokensFile(tokens=tmp_path / "a.safetensors"))


def test_a_token_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not at all")
    with pytest.raises(CalibrationError, match=r"cannot be read: .*; it must be a safetensors file"):
        token_ids(TokensFile(tokens=tmp_path / "a.safetensors"))
