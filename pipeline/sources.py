"""Where calibration text comes from: Python's own documentation, local files, hub datasets, or ready tokens.

A source is written in YAML as a word, or as a mapping in which exactly one key names the kind:

    embedded
    {text: corpus.txt}
    {jsonl: rows.jsonl, field: text}        also {parquet: FILE, ...} and {arrow: FILE, ...}
    {hub: allenai/c4, revision: <commit>, config: en, split: train, field: text}
    {tokens: tokens.safetensors}

For calibration the model may write it itself: see `own_text`.

Rows are streamed through `datasets`, which only this file imports: nothing is downloaded beyond what is read.
"""

import glob
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Tag
from safetensors import SafetensorError, safe_open

from pipeline.errors import CalibrationError

KINDS = ("text", "jsonl", "parquet", "arrow", "hub", "tokens")


class SourceModel(BaseModel):
    """What every mapping source shares: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TextFile(SourceModel):
    """One UTF-8 text file, taken whole, its line ends as they are."""

    text: Path
    """The file."""


class JsonLines(SourceModel):
    """One JSON object a line, each a document."""

    jsonl: Path
    """The file."""
    field: str = "text"
    """The key that holds a row's text."""


class Parquet(SourceModel):
    """A parquet file, each row a document."""

    parquet: Path
    """The file."""
    field: str = "text"
    """The column that holds the text."""


class Arrow(SourceModel):
    """An Arrow file (stream or random access), each row a document."""

    arrow: Path
    """The file."""
    field: str = "text"
    """The column that holds the text."""


class Hub(SourceModel):
    """A dataset on the Hugging Face hub, streamed; or a local directory that holds one."""

    hub: str
    """`organisation/name`, or a directory."""
    revision: str | None = None
    """Commit, tag or branch; pin a commit, or the data may change between two runs."""
    config: str | None = None
    """The dataset's configuration, for instance `en` of allenai/c4."""
    split: str = "train"
    """The split to read."""
    field: str = "text"
    """The column that holds the text."""


class TokensFile(SourceModel):
    """A safetensors file of token ids: an integer tensor [N, T] or [num_tokens], `tokens` or the only one."""

    tokens: Path
    """The file."""


RowSource = JsonLines | Parquet | Arrow | Hub
TextSource = Literal["embedded"] | TextFile | RowSource
Source = TextSource | TokensFile


def _kind(value: object) -> str | None:
    """The key that names a source's kind; None when there is none, or more than one."""
    if value in ("embedded", "self"):
        return str(value)
    keys: Iterable[str] = ()
    if isinstance(value, Mapping):
        keys = value.keys()
    elif isinstance(value, SourceModel):
        keys = type(value).model_fields
    found = [kind for kind in (*KINDS, "self") if kind in keys]
    return found[0] if len(found) == 1 else None


def by_kind(words: str, kinds: Iterable[str]) -> Discriminator:
    """What tells sources of these kinds, and the words that are sources, from each other."""
    rule = f"a source is {words}, or a mapping with exactly one of the keys {', '.join(kinds)}"
    message = f"{rule}; a text file is written {{text: FILE}}"
    return Discriminator(_kind, custom_error_type="calibration_source", custom_error_message=message)


Stored = (
    Annotated[Literal["embedded"], Tag("embedded")]
    | Annotated[TextFile, Tag("text")]
    | Annotated[JsonLines, Tag("jsonl")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[Arrow, Tag("arrow")]
    | Annotated[Hub, Tag("hub")]
    | Annotated[TokensFile, Tag("tokens")]
)

SourceField = Annotated[Stored, by_kind("the word embedded", KINDS)]
"""`Source` as a field of a pydantic model: the key present decides which model reads the mapping."""


def describe(source: str | BaseModel) -> str:
    """The source in one line, as YAML writes it; for `embedded`, with the Python whose text it is."""
    if isinstance(source, str):
        return f"embedded (documentation topics of Python {platform.python_version()})"
    items = source.model_dump(exclude_none=True).items()
    return "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"


def documents(source: TextSource) -> Iterator[str]:
    """The source's documents in its own order: one for `embedded` and for a text file, else one a row.

    Raises CalibrationError, while iterating, when the source is missing, unreadable or not UTF-8, or when a
    row has no text in the field.
    """
    if isinstance(source, str):
        yield _embedded_text()
    elif isinstance(source, TextFile):
        yield _file_text(source.text)
    else:
        yield from _row_texts(source)


def token_ids(source: TokensFile) -> torch.Tensor:
    """The file's token ids as they are stored, int64 on the CPU: [N, T] or [num_tokens].

    Raises CalibrationError when there is no such file, no single tensor to take, or no integers in it.
    """
    path = _existing(source.tokens)
    stored = _token_tensor(path)
    dtype, shape = stored.dtype, list(stored.shape)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or len(shape) not in (1, 2):
        raise CalibrationError(
            f"the tensor in {path} is {dtype} of shape {shape}; token ids are integers of shape [N, T] or "
            "[num_tokens]: store them so"
        )
    return stored.to(torch.int64)


def _token_tensor(path: Path) -> torch.Tensor:
    """The tensor named `tokens`, or the only one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if "tokens" not in names and len(names) != 1:
                raise CalibrationError(f"{path} holds the tensors {names}; name the one of token ids `tokens`")
            tensor: torch.Tensor = file.get_tensor("tokens" if "tokens" in names else names[0])
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}; it must be a safetensors file") from error
    return tensor


def _embedded_text() -> str:
    """Python's documentation topics, sorted by name; the text differs between Python versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python comes without its documentation topics (pydoc_data); name a source: {text: FILE}"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CalibrationError(f"there is no file {path.absolute()}; name an existing file in calibration.source")
    return path


def _file_text(path: Path) -> str:
    try:
        return _existing(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.start} ({error.object[error.start]:#04x}) starts no "
            "valid character; convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error}; make it readable to this user") from error


def _row_texts(source: RowSource) -> Iterator[str]:
    """One text a row. Whatever the readers of `datasets` raise leaves here as a CalibrationError."""
    try:
        for index, row in enumerate(_rows(source)):
            yield _row_text(row, source.field, f"row {index} of {describe(source)}")
    except CalibrationError:
        raise
    except StopIteration as error:  # how `datasets` meets an empty file
        raise CalibrationError(f"{describe(source)} holds no rows; name a file or a split that has some") from error
    except Exception as error:
        raise CalibrationError(
            f"{describe(source)} cannot be read: {type(error).__name__}: {error}; check the name, the format "
            "and, on the hub, the revision, the split and the access rights"
        ) from error


def _row_text(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise CalibrationError(f"{where} has no field {field!r}; its fields are {sorted(row)}: set `field` to one")
    text = row[field]
    if not isinstance(text, str):
        raise CalibrationError(
            f"field {field!r} of {where} holds {type(text).__name__}, not text; set `field` to one that does"
        )
    return text


def _rows(source: RowSource) -> Iterable[Mapping[str, Any]]:
    match source:
        case JsonLines(jsonl=path):
            return _local_rows("json", path)
        case Parquet(parquet=path):
            return _local_rows("parquet", path)
        case Arrow(arrow=path):
            return _local_rows("arrow", path)
        case Hub():
            return _hub_rows(source)


def _local_rows(reader: str, path: Path) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    # `datasets` reads a name as a pattern, and leaves a lock file in its cache even when it only streams.
    pattern = glob.escape(str(_existing(path)))
    with tempfile.TemporaryDirectory() as cache:
        rows: Iterable[Mapping[str, Any]] = load_dataset(
            reader, data_files=pattern, split="train", streaming=True, cache_dir=cache
        )
    return rows


def _hub_rows(source: Hub) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    rows: Iterable[Mapping[str, Any]] = load_dataset(
        source.hub, name=source.config, revision=source.revision, split=source.split, streaming=True
    )
    return rows
