"""Tensors of zeros that a checkpoint has not, or has with other values: seen like this, nobody else has to know.

A bias of zeros changes nothing, so a model whose MLPs are to get biases begins as the same model with biases of zeros:
blocks read them, steps give them values, and what is written and verified has them. An attention whose output
projection is zero adds nothing, so a model without some attentions is the dense one with zeros there.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from pipeline.anatomy import mlp_of
from pipeline.block_widths import Width
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.header import TensorEntry
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.shape import Shape
from pipeline.shards import PIECE_BYTES
from pipeline.silencing import writers
from pipeline.skeleton import Skeleton

TAKE_MLP_BIASES = ("granite", "llama")
"""Families, by `model_type`, whose config.json can give the linears of an MLP biases (`mlp_bias`)."""


class WithZeros(Checkpoint):
    """A checkpoint of which some tensors are zeros, that lie in no file: `shard_of` has the others alone."""

    def __init__(self, source: Checkpoint, zeros: Mapping[str, TensorEntry]) -> None:
        self.directory = source.directory
        self.tensors = {**source.tensors, **zeros}
        self.shard_of = {name: file for name, file in source.shard_of.items() if name not in zeros}
        self._source, self._zeros = source, zeros

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Fill `target` with zeros, or as the source does."""
        if name in self._zeros:
            target.zero_()
        else:
            self._source.read_into(name, target)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU."""
        entry = self._zeros.get(name)
        return self._source.read(name) if entry is None else torch.zeros(entry.shape, dtype=entry.dtype)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, piece by piece."""
        if name not in self._zeros:
            yield from self._source.chunks(name)
            return
        num_bytes = self._zeros[name].num_bytes
        for begin in range(0, num_bytes, PIECE_BYTES):
            yield memoryview(bytes(min(PIECE_BYTES, num_bytes - begin)))

    def locate(self, name: str) -> Path:
        """The file that holds a tensor; CheckpointError for one that lies in none."""
        self._find(name)
        return self._source.locate(name)

    def will_need(self, names: Iterable[str]) -> None:
        """Have the kernel read tensors ahead, those that lie in files."""
        self._source.will_need(name for name in names if name not in self._zeros)

    def close(self) -> None:
        """Close the source's shards."""
        self._source.close()

    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint()


def adds_biases(step: ShapeStep, dense: Skeleton, width: Width | None) -> bool:
    """Tell whether what neurons gave on average is to go into biases that the blocks do not have yet.

    width: neurons that every block is to keep, or None where all stay. Raises ConfigError for families that cannot
    have such biases.
    """
    if width is None or not isinstance(step, Narrowing) or step.recovery != "bias":
        return False
    model_type = dense.model.config.model_type
    if f"{mlp_of(dense.model.config).reader}.bias" in dense.block_names(0):
        return False
    if model_type not in TAKE_MLP_BIASES:
        raise ConfigError(
            f"{step.method} with `recovery: bias` gives the MLP biases, and transformers' {model_type} has no place "
            f"for them: of the families whose neurons can be removed, only {' and '.join(TAKE_MLP_BIASES)} have. Set "
            "`recovery: mask`, `lstsq` or `none`"
        )
    return True


def with_zeros(dense: Skeleton, shape: Shape) -> Checkpoint:
    """Return the dense model's checkpoint with the tensors of zeros that a shape asks for; itself, where with none."""
    zeros = {
        stored: _zero_bias(dense, block, own, stored)
        for block in range(dense.num_blocks)
        for own, stored in added_names(dense, block, shape).items()
    }
    for stored in (name for block in shape.silent for name in writers(dense, block)):
        entry = dense.checkpoint.tensors[stored]
        zeros[stored] = _entry(stored, entry.dtype, entry.shape)
    return WithZeros(dense.checkpoint, zeros) if zeros else dense.checkpoint


def added_names(dense: Skeleton, block: int, shape: Shape) -> dict[str, str]:
    """Return the biases that a block gets: parameter name within it -> checkpoint name, after that of the weights."""
    if not shape.mlp_bias:
        return {}
    mlp, names = mlp_of(dense.model.config), dense.block_names(block)
    weights = {f"{linear}.weight": f"{linear}.bias" for linear in (*mlp.makers, mlp.reader)}
    return {bias: names[weight].removesuffix("weight") + "bias" for weight, bias in weights.items()}


def _zero_bias(dense: Skeleton, block: int, own: str, stored: str) -> TensorEntry:
    """As long as its weight has rows, in the weight's dtype."""
    weight = dense.checkpoint.tensors[dense.block_names(block)[own.removesuffix("bias") + "weight"]]
    return _entry(stored, weight.dtype, weight.shape[:1])


def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=shape, start=0, num_bytes=prod(shape) * dtype.itemsize)
