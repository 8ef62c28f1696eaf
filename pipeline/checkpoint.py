"""A model directory seen as named tensors, wherever its shards put them.

A directory holds one `model.safetensors`, or several shards and `model.safetensors.index.json`, whose
`weight_map` says which shard has which tensor. Only headers are read when a checkpoint is opened: tensors
are read one at a time, when asked for. What the index does not name is not part of the model (transformers
does not load it either); what it names must be there, once.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from pydantic import JsonValue
from transformers import AutoConfig, PretrainedConfig

from pipeline.durable import write_atomically
from pipeline.errors import CheckpointError, UnsupportedCheckpoint
from pipeline.header import replaced
from pipeline.shards import ShardReader, TensorEntry, hash_file, header_bytes, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

MAX_OPEN_SHARDS = 4
"""Each open shard keeps a descriptor and a staging buffer; blocks rarely straddle more than two shards."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NEVER_COPIED = (*_PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".py", ".pyc", ".index.json")
_SIDE_FILES = (
    "config.json", "generation_config.json", "*processor_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "tekken.json", "vocab*", "merges*",
    "*.model", "*.tiktoken", "*.spm", "chat_template*", "*.jinja",
    "license*", "notice*", "use_policy*",
)  # fmt: skip
"""What an output directory needs beside its weights, in lower case; anything else is left behind."""


class Checkpoint:
    """The tensors of one model directory, by name. Safe to use from several threads, which take turns."""

    directory: Path
    tensors: dict[str, TensorEntry]
    """All names, by shard (sorted), then in the order of the file."""
    shard_of: dict[str, str]
    """Tensor name -> file name of its shard."""

    def __init__(self, directory: Path, headers: Mapping[str, Mapping[str, TensorEntry]]) -> None:
        """`headers`: shard file name -> the tensors of that shard which are the model's. See `open`."""
        self.directory = directory
        self.tensors = {name: entry for file in sorted(headers) for name, entry in headers[file].items()}
        self.shard_of = {name: file for file in sorted(headers) for name in headers[file]}
        self._headers = headers
        self._readers: dict[str, ShardReader] = {}  # the least recently used first
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read the index and every shard's header.

        Raises CheckpointError where the directory, its config.json, the index or a shard is missing or the
        index and the shards disagree, UnsupportedCheckpoint where the weights are pickled, MalformedShard.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is no directory: give the one that holds the model")
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} has no config.json, so it is not a whole model directory")
        # The order of transformers: where both exist, it loads the single file.
        if (directory / INDEX_NAME).is_file() and not (directory / SINGLE_NAME).is_file():
            return cls(directory, _indexed_headers(directory, _read_weight_map(directory / INDEX_NAME)))
        single = _single_file(directory)
        return cls(directory, {single.name: read_header(single)})

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Fill `target` as `ShardReader.read_into` does; CheckpointError for an unknown name."""
        with self._lock:
            self._reader(name).read_into(name, target)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU; raises as `read_into` does."""
        with self._lock:
            return self._reader(name).read(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes as `ShardReader.chunks` gives them; CheckpointError for an unknown name.

        Opens the shard anew, so that no other read can close it between two pieces.
        """
        with self._open_shard(self._find(name)) as reader:
            yield from reader.chunks(name)

    def locate(self, name: str) -> Path:
        """The file that holds a tensor, for whoever reads it by itself: still the one whose header was checked.

        Raises CheckpointError for an unknown name, or where the file has been replaced.
        """
        with self._lock:
            return self._reader(name).still_there()

    def will_need(self, names: Iterable[str]) -> None:
        """Have the kernel read tensors ahead into its page cache, while something else is done; never fails."""
        if sys.platform != "linux":
            return
        for name in names:
            entry = self.tensors[name]
            with suppress(OSError), (self.directory / self.shard_of[name]).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), entry.start, entry.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def total_bytes(self) -> int:
        """The size of all tensors as stored."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def numel(self) -> int:
        """The numbers in all tensors."""
        return sum(prod(entry.shape) for entry in self.tensors.values())

    def matrix_dtype(self) -> torch.dtype:
        """The dtype of the first matrix: what the model's weights are stored in."""
        return next((entry.dtype for entry in self.tensors.values() if len(entry.shape) == 2), torch.float32)

    def fingerprint(self) -> str:
        """A sha256 (hexadecimal) that changes with config.json and with any shard's name, size or header.

        Reads no tensor, so it is cheap, and so it does not see weights exchanged within one layout.
        """
        digest = hashlib.sha256()
        digest.update(hash_file(self.directory / "config.json").encode())
        for file in sorted(self._headers):
            path = self.directory / file
            header = header_bytes(path)
            digest.update(f"{file} {path.stat().st_size} ".encode() + header)
        return digest.hexdigest()

    def settings(self) -> dict[str, JsonValue]:
        """What config.json says; raises CheckpointError where that is not JSON."""
        path = self.directory / CONFIG_NAME
        try:
            settings: dict[str, JsonValue] = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
        return settings

    def config_bytes(self) -> bytes:
        """The config.json of an output: the source's own, to the byte."""
        return (self.directory / CONFIG_NAME).read_bytes()

    def model_config(self) -> PretrainedConfig:
        """The same, as transformers reads it: a new one at every call.

        Raises UnsupportedCheckpoint where transformers does not know the model.
        """
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedCheckpoint(
                f"transformers does not know the model in {self.directory}: {str(error).splitlines()[0]} Custom code "
                "is never run; use a model type that this version of transformers has"
            ) from None
        return config

    def side_files(self) -> list[Path]:
        """Config, tokenizer, chat templates and licence, sorted: never weights, code or an index."""
        templates = (self.directory / "additional_chat_templates").glob("*.jinja")
        beside = (path for path in self.directory.iterdir() if _is_side_file(path.name))
        return sorted(path for path in (*beside, *templates) if path.is_file())

    def _reader(self, name: str) -> ShardReader:
        """The reader of the shard that has `name`, opened if need be; the one unused longest is closed."""
        file = self._find(name)
        reader = self._readers.pop(file, None) or self._open_shard(file)
        self._readers[file] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def _find(self, name: str) -> str:
        if name in self.shard_of:
            return self.shard_of[name]
        nearest = get_close_matches(name, self.shard_of, n=1)
        hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
        raise CheckpointError(f"{self.directory} has no tensor {name!r} among its {len(self.tensors)}{hint}")

    def _open_shard(self, file: str) -> ShardReader:
        reader = ShardReader(self.directory / file)
        if not self._headers[file].items() <= reader.entries.items():
            raise replaced(reader.path)
        return reader


def write_index(directory: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write model.safetensors.index.json: tensor name -> shard file name, and all tensors' bytes.

    Raises StorageError where the disk refuses.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / INDEX_NAME, content.encode())


def _single_file(directory: Path) -> Path:
    """The one file with all weights."""
    if (directory / SINGLE_NAME).is_file():
        return directory / SINGLE_NAME
    shards = sorted(directory.glob("*.safetensors"))
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise CheckpointError(
            f"{directory} has {len(shards)} safetensors files ({_listed([path.name for path in shards])}) "
            f"and no {INDEX_NAME} to say what is where: fetch the index, or leave one file"
        )
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise UnsupportedCheckpoint(
            f"{directory} has only pickled weights ({_listed(pickled)}), and loading a pickle can run any "
            "code: on a machine you trust with it, load the model with transformers and convert it with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{directory} has no *.safetensors file: the model's weights must lie in it")


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name -> shard file name, each a plain name."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names: fetch it again")
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(
                f"{path} puts tensor {name!r} in {file!r}, which could lie outside the model directory: only "
                "plain names of files beside the index are followed"
            )
    return weight_map


def _indexed_headers(directory: Path, weight_map: dict[str, str]) -> dict[str, dict[str, TensorEntry]]:
    """Shard file name -> the tensors that `weight_map` puts there; what it does not name is left out."""
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(files)} shards its index names "
            f"({_listed(missing)}): finish the download"
        )
    headers = {file: read_header(directory / file) for file in files}
    lacking = [name for name, file in weight_map.items() if name not in headers[file]]
    if lacking:
        raise CheckpointError(
            f"{directory} lacks {len(lacking)} of {len(weight_map)} tensors in the shards where its index "
            f"puts them ({_listed(lacking)}): index and shards must be of one model"
        )
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name, file) != file:
                raise CheckpointError(
                    f"{directory} has tensor {name!r} twice, in {weight_map[name]} and in {file}: "
                    "which one counts cannot be known; remove one"
                )
    return {
        file: {name: entry for name, entry in header.items() if name in weight_map} for file, header in headers.items()
    }


def _is_side_file(name: str) -> bool:
    lower = name.lower()
    wanted = any(fnmatchcase(lower, pattern) for pattern in _SIDE_FILES)
    return wanted and not lower.endswith(_NEVER_COPIED)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
