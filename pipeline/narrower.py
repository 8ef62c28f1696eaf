"""A checkpoint without some of its blocks: the same bytes under the names they have in the smaller model.

Nothing is copied. Block k of the smaller model reads the tensors of block `kept[k]` of the dense one, and its config
says how many there are, so that all that comes after (pruning, resuming, evaluating, verifying) sees a model like any
other, and masks, windows and places in a cache are right because transformers builds the smaller model itself.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn
from transformers import PretrainedConfig

from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedCheckpoint
from pipeline.shape import Shape, edited_settings
from pipeline.skeleton import Skeleton
from pipeline.zeros import added_names, with_zeros

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes by which a block knows its own number: its place in a cache."""


class FewerBlocks(Checkpoint):
    """A checkpoint seen under other names, some of its tensors not at all, with a config of its own."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str], config: PretrainedConfig, shape: Shape) -> None:
        """`names`: name here -> name in the source; `config`: the dense model's, as loaded."""
        self.directory = source.directory
        self.tensors = {name: replace(source.tensors[stored], name=name) for name, stored in names.items()}
        in_files = source.shard_of
        self.shard_of = {name: in_files[stored] for name, stored in names.items() if stored in in_files}
        self._source, self._names, self._config = source, names, config
        self._settings = edited_settings(config, source.settings(), shape)
        self._loaded = edited_settings(config, source.settings(), replace(shape, width=None, heads=None))

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Fill `target` as the source does."""
        self._source.read_into(self._stored(name), target)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU."""
        return self._source.read(self._stored(name))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, piece by piece."""
        return self._source.chunks(self._stored(name))

    def locate(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._source.locate(self._stored(name))

    def will_need(self, names: Iterable[str]) -> None:
        """Have the kernel read tensors ahead."""
        self._source.will_need(self._names[name] for name in names)

    def close(self) -> None:
        """Close the source's shards."""
        self._source.close()

    def fingerprint(self) -> str:
        """That of the source: which blocks stay is told apart from it."""
        return self._source.fingerprint()

    def settings(self) -> dict[str, JsonValue]:
        """What config.json says of the smaller model."""
        return dict(self._settings)

    def config_bytes(self) -> bytes:
        """The config.json of the smaller model."""
        return json.dumps(self._settings, indent=2).encode() + b"\n"

    def model_config(self) -> PretrainedConfig:
        """What transformers builds to read these tensors: a new one at every call. All neurons and heads are there."""
        return type(self._config).from_dict(self._loaded)

    def _stored(self, name: str) -> str:
        """The source's name; CheckpointError for one that is not known here."""
        if name not in self._names:
            self._find(name)
        return self._names[name]


def narrowed(dense: Skeleton, shape: Shape) -> Skeleton:
    """Return the skeleton of a model of which only some blocks are left.

    Raises UnsupportedCheckpoint where they would not be the blocks that they are in the dense model.
    """
    sizes = {dense.block_numel(block) for block in range(dense.num_blocks)}
    if len(sizes) > 1:
        raise UnsupportedCheckpoint(
            f"{dense.model.config.model_type} has blocks of {min(sizes):,} to {max(sizes):,} parameters; whole blocks "
            "can be dropped only where all are of one size. Mask weights instead (wanda, besa, …)"
        )
    view = FewerBlocks(with_zeros(dense, shape), _names(dense, shape), dense.model.config, shape)
    if view.model_config().num_hidden_layers != len(shape.kept):
        raise UnsupportedCheckpoint(
            f"{dense.model.config.model_type} takes its number of blocks from elsewhere than from config.json's "
            "num_hidden_layers, so its blocks cannot be dropped; mask weights instead (wanda, besa, …)"
        )
    skeleton = Skeleton(view, dense.device, dense.dtype)
    for number, block in enumerate(shape.kept):
        _require_same(dense.blocks[block], skeleton.blocks[number], block, dense.model.config.model_type)
    return skeleton


def _names(dense: Skeleton, shape: Shape) -> dict[str, str]:
    """Name in the smaller model -> name in the source, for all tensors that stay, and those of zeros that come.

    Tensors within a block that transformers does not know (old buffers) stay behind: they bear its number.
    """
    blocks = [dense.block_names(block) | added_names(dense, block, shape) for block in range(dense.num_blocks)]
    prefixes = tuple(
        {stored.removesuffix(own) for names in blocks for own, stored in names.items() if stored.endswith(f".{own}")}
    )
    named = {name: name for name in dense.outside_names() if not name.startswith(prefixes)}
    for number, block in enumerate(shape.kept):
        if blocks[number].keys() != blocks[block].keys():
            raise _other_block(block, f"block {number} has other tensors", dense.model.config.model_type)
        named |= {blocks[number][own]: stored for own, stored in blocks[block].items()}
    return named


def _require_same(dense: nn.Module, left: nn.Module, block: int, model_type: str) -> None:
    """Hold a block of the smaller model against the one whose weights it takes: equal but for its number."""
    for (name, before), (_, after) in zip(dense.named_modules(), left.named_modules(), strict=True):
        for key, value in vars(before).items():
            plain = value is None or isinstance(value, bool | int | float | str | tuple)
            if plain and key not in _NUMBERS and vars(after).get(key) != value:
                what = f"{name}.{key}" if name else key
                raise _other_block(block, f"its {what} would change from {value} to {vars(after).get(key)}", model_type)


def _other_block(block: int, why: str, model_type: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{model_type}: block {block} would be another block once those before it are gone: {why}, for it depends on "
        "the block's number in a way that config.json cannot say block by block; mask weights instead (wanda, besa, …)"
    )
