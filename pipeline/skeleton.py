"""A model without its weights: transformers' own module tree on the meta device, filled one block at a time.

Buffers (rotary tables, embedding scales) are real; parameters exist by name and shape only, until `fill` reads
them from a checkpoint and after `release` drops them. Checkpoint names and parameter names are matched through
transformers' own conversion table, in both directions.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from math import prod
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.anatomy import WIDTH_KEY
from pipeline.attention import HeadLayout
from pipeline.block_widths import take_widths
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NumericsError, UnsupportedCheckpoint
from pipeline.heap import give_back_freed_memory
from pipeline.numerics import all_finite

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

GIVE_BACK_BYTES = 3 << 24
"""Weights dropped before freed memory is given back: doing so makes what runs next fault its pages in again."""


class TensorSource(Protocol):
    """Anything that can read a tensor by its checkpoint name: a checkpoint, or one of its shards."""

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Fill `target`, converting its dtype."""


class Skeleton:
    """The module tree, its blocks, and which checkpoint tensor belongs to which parameter."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._dropped_bytes = 0
        self._dense_blocks: dict[int, nn.Module] = {}
        config = checkpoint.model_config()
        self.widths = take_widths(config)
        """Neurons of each block, where they differ; the model's config is then one of blocks alike."""

        self.model = build_empty(config, dtype, str(checkpoint.directory))
        self.block_prefix, self.blocks = find_blocks(self.model)
        for index, width in enumerate(self.widths or ()):
            self.reshape_block(index, width)
        self._dense_blocks.clear()  # this is how they are stored
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._refuse_what_we_cannot_prune()
        self.stored_name = self._match_names()
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings
        positions = self.model.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        self.num_positions: int | None = self.model.config.to_dict().get(positions)

    @property
    def num_blocks(self) -> int:
        """Decoder layers of the model."""
        return len(self.blocks)

    def block_names(self, index: int) -> dict[str, str]:
        """Return, for one block, parameter name within the block -> checkpoint name, in checkpoint order."""
        prefix = f"{self.block_prefix}.{index}."
        return {own.removeprefix(prefix): s for own, s in self.stored_name.items() if own.startswith(prefix)}

    def block_numel(self, index: int) -> int:
        """Return how many numbers a block's tensors hold."""
        return sum(prod(self.checkpoint.tensors[name].shape) for name in self.block_names(index).values())

    def outside_names(self) -> list[str]:
        """Return the checkpoint names of everything that belongs to no block, unknown tensors included."""
        inside = {name for index in range(self.num_blocks) for name in self.block_names(index).values()}
        return [name for name in self.checkpoint.tensors if name not in inside]

    def load_block(self, index: int, source: TensorSource) -> nn.Module:
        """Read one block's tensors into its module and return it."""
        block: nn.Module = self.blocks[index]
        self.fill(block, self.block_names(index), source)
        return block

    def reshape_block(self, index: int, width: int, heads: HeadLayout | None = None) -> nn.Module:
        """Put a block with so many neurons, built without weights by its own class, in the place of a larger one.

        heads: where they are not those of the dense block. It stays there until it is released. Returns the larger
        block, whose weights are as they were.
        """
        dense: nn.Module = self.blocks[index]
        config = deepcopy(self.model.config)
        config.update({WIDTH_KEY: width} | (heads.settings if heads else {}))
        config._attn_implementation = self.model.config._attn_implementation  # a copy forgets it, and the causal mask
        build: Any = type(dense)
        with init_empty_weights(include_buffers=False):
            narrow: nn.Module = build(config, index).eval()
        for name, buffer in dense.named_buffers():
            owner, leaf = _owner(narrow, name)
            owner._buffers[leaf] = buffer
        self._dense_blocks.setdefault(index, dense)
        self.blocks[index] = narrow
        return dense

    def shape_of(self, index: int, own: str) -> tuple[int, ...]:
        """Return the shape of a block's tensor as the block is now."""
        return tuple(_tensor(self.blocks[index], own).shape)

    def put(self, index: int, own: str, tensor: torch.Tensor) -> None:
        """Make a tensor a block's own, in the dtype it has in memory. Raises NumericsError on NaN or Inf."""
        value = tensor.to(self.device, self.dtype_of(index, own))
        _put(self.blocks[index], own, self.block_names(index)[own], value)

    def adopt_block(self, index: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Put tensors that have been read (own name -> tensor, any device and float dtype) into a block; return it.

        Raises NumericsError on NaN or Inf.
        """
        block: nn.Module = self.blocks[index]
        names = self.block_names(index)
        for own, read in tensors.items():
            tensor = read.to(self.device, non_blocking=True).to(self.dtype_of(index, own))
            _put(block, own, names[own], tensor)
        return block

    def dtype_of(self, index: int, own: str) -> torch.dtype:
        """Return the dtype a block's tensor has in memory: parameters the compute dtype, buffers their own."""
        return self._dtype_of(*_owner(self.blocks[index], own))

    def fill(self, module: nn.Module, names: dict[str, str], source: TensorSource) -> None:
        """Read tensors (own name -> checkpoint name) into a module. Raises NumericsError on NaN or Inf."""
        for own, stored in names.items():
            shape = _tensor(module, own).shape
            tensor = torch.empty(shape, dtype=self._dtype_of(*_owner(module, own)), device=self.device)
            source.read_into(stored, tensor)
            _put(module, own, stored, tensor)

    def release(self, module: nn.Module, names: Iterable[str]) -> None:
        """Drop parameters, which go back to the meta device; the system gets their memory, small ones' together."""
        self._dropped_bytes += sum(_drop(*_owner(module, own)) for own in names)
        if self._dropped_bytes >= GIVE_BACK_BYTES:
            give_back_freed_memory()
            self._dropped_bytes = 0

    def release_block(self, index: int) -> None:
        """Drop one block's parameters; one that has been reshaped is the dense one again."""
        self.release(self.blocks[index], self.block_names(index))
        self.blocks[index] = self._dense_blocks.pop(index, self.blocks[index])

    def _dtype_of(self, owner: nn.Module, leaf: str) -> torch.dtype:
        """Parameters live in the compute dtype, buffers in their own."""
        if leaf in owner._parameters:
            return self.dtype
        buffer = owner._buffers[leaf]
        assert buffer is not None
        return buffer.dtype

    def _refuse_what_we_cannot_prune(self) -> None:
        for name, parameter in self.blocks[0].named_parameters():
            if parameter.ndim > 2:
                raise UnsupportedCheckpoint(
                    f"{self.model.config.model_type}: block parameter {name} has {parameter.ndim} dimensions "
                    f"{tuple(parameter.shape)}; only blocks made of matrices can be pruned so far, not fused "
                    "experts or convolutions. Choose a dense model"
                )

    def _match_names(self) -> dict[str, str]:
        """Return parameter (or persistent buffer) name -> checkpoint name, in checkpoint order."""
        state = dict(self.model.state_dict())
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        stored: dict[str, str] = {}
        for name, entry in self.checkpoint.tensors.items():
            own, converted = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if converted is not None:
                raise UnsupportedCheckpoint(
                    f"tensor {name} is stored in another layout than {self.model.config.model_type} has in memory "
                    "(fused experts); such checkpoints cannot be pruned so far. Choose a dense model"
                )
            if own in state:
                _check_entry(name, entry.shape, entry.dtype, tuple(state[own].shape))
                stored[own] = name
        self._add_tied(stored)
        self._refuse_missing(stored)
        return stored

    def _add_tied(self, stored: dict[str, str]) -> None:
        """A tied parameter that the checkpoint does not carry is read from the one it is tied to."""
        if not self.model.config.tie_word_embeddings:
            return
        for own, tied_to in self.model.all_tied_weights_keys.items():
            if own not in stored and tied_to in stored:
                stored[own] = stored[tied_to]
            elif tied_to not in stored and own in stored:
                stored[tied_to] = stored[own]

    def _refuse_missing(self, stored: dict[str, str]) -> None:
        missing = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in stored]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.directory} lacks {len(missing)} tensors that {self.model.config.model_type} needs, "
                f"such as {missing[0]}; the download is incomplete, or the config.json is of another model"
            )


def build_empty(config: PretrainedConfig, dtype: torch.dtype, origin: str) -> PreTrainedModel:
    """Return transformers' model for a config, parameters on the meta device, buffers real.

    Raises UnsupportedCheckpoint, naming `origin`, where the model is quantised or not a causal language model.
    """
    if config.to_dict().get("quantization_config") is not None:
        raise UnsupportedCheckpoint(
            f"{origin} is quantised (config.json has quantization_config); pruning needs the original "
            "float32, bfloat16 or float16 weights: use the checkpoint it was quantised from"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedCheckpoint(
            f"{origin} ({config.model_type}) is not a causal language model: {str(error).splitlines()[0]}"
        ) from None
    model.eval()
    model.config.use_cache = False
    assert isinstance(model, PreTrainedModel)
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and list of the decoder layers: the one list of transformers layers in the model."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(found) != 1:
        raise UnsupportedCheckpoint(
            f"{model.config.model_type} has {len(found)} lists of {model.config.num_hidden_layers} transformer "
            "layers, where exactly one is needed; encoder-decoder and multi-tower models cannot be pruned so far"
        )
    return found[0]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _drop(owner: nn.Module, leaf: str) -> int:
    """Put a parameter on the meta device; return how many bytes it had elsewhere."""
    parameter = owner._parameters.get(leaf)
    if parameter is None or parameter.is_meta:
        return 0
    owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return parameter.nbytes


def _tensor(module: nn.Module, own: str) -> torch.Tensor:
    """A parameter or buffer, whether it is filled or not."""
    owner, leaf = _owner(module, own)
    tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    assert tensor is not None
    return tensor


def _put(module: nn.Module, own: str, stored: str, tensor: torch.Tensor) -> None:
    """Make a tensor a parameter or buffer of a module. Raises NumericsError on NaN or Inf."""
    if not all_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise NumericsError(
            f"{stored} holds {bad} NaN or Inf of {tensor.numel()} numbers once read as {tensor.dtype}; a "
            "model with such weights cannot be pruned: check the download, or compute in float32"
        )
    owner, leaf = _owner(module, own)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _check_entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise CheckpointError(f"{name} has shape {shape} on disk, but config.json makes it {wanted}")
    if len(shape) >= 2 and dtype not in STORED_DTYPES:
        raise UnsupportedCheckpoint(
            f"{name} is stored as {dtype}; pruning needs float32, bfloat16 or float16 weights: use the checkpoint "
            "it was quantised from"
        )
