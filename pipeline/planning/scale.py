"""A run in numbers: all that its footprint and its time depend on, from its configuration and the headers."""

from dataclasses import dataclass
from math import prod

import torch

from pipeline.config import RunConfig
from pipeline.ledger import TOKENS_NAME
from pipeline.own_text import WrittenByModel
from pipeline.planning.choosing import Choosing
from pipeline.planning.left import shapes_left
from pipeline.planning.work import Linears, Workload, likely_groups, shapes_of
from pipeline.recipe import Recipe
from pipeline.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The whole model writing its calibration text, in numbers."""

    num_sequences: int
    """That are written."""

    batch: int
    """Of them at a time."""

    numel: int
    """Numbers in all weights, those that are tied counted twice: they are held twice."""

    cache_numel: int
    """Keys and values of one token in all blocks."""

    stored_bytes: int
    """Of the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A run in numbers: all that its footprint depends on, beside the choice."""

    work: Workload
    recipe: Recipe
    names: tuple[tuple[str, ...], ...]
    """Of the linears of the largest block, by the input they share; their shapes are those of `work.groups`."""

    block_numel: int
    """Numbers in the largest block, norms and biases included."""

    outside_numel: int
    """Numbers in the largest weight outside the blocks: embedding and head are never held together."""

    vocab_size: int
    dtype: torch.dtype
    """In which blocks run."""

    stored: torch.dtype
    """In which weights are stored."""

    unified: bool
    """Whether blocks run in host memory: on a CPU."""

    windows: tuple[int, int] | None = None
    """Windows of an evaluation and their length, where there is one and its number of windows is known."""

    surveys: bool = False
    """Whether the dense model is looked through first."""

    num_dropped: int = 0
    """Blocks of the dense model that go before all of this; nothing else here counts them."""

    choosing: Choosing | None = None
    """What choosing them takes, where they are to be chosen yet."""

    generation: Generation | None = None
    """Where the model has its calibration text to write yet."""

    @property
    def block_bytes(self) -> int:
        """Weights of a block where blocks run."""
        return self.block_numel * self.dtype.itemsize

    @property
    def works(self) -> bool:
        """Whether blocks are worked on; else they are copied as they are, and nothing is run for them."""
        return bool(self.recipe.steps) or self.work.left is not None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of every linear, by its name."""
        return self._named(self.work.groups)

    @property
    def shapes_left(self) -> dict[str, tuple[int, int]]:
        """The same once neurons have been taken out of the block; where blocks differ, one may keep all of them."""
        differ = self.recipe.shape is not None and self.recipe.shape.widths_differ
        return self.shapes if differ else self._named(self.work.cut.groups)

    def _named(self, groups: tuple[Linears, ...]) -> dict[str, tuple[int, int]]:
        pairs = zip(self.names, groups, strict=True)
        return {name: shape for names, group in pairs for name, shape in zip(names, group, strict=True)}

    @property
    def num_boundaries(self) -> int:
        """The pruned stream, and where asked the targets and the dense stream (which serves as targets too)."""
        return self.recipe.num_boundaries


def scale_of(config: RunConfig, skeleton: Skeleton) -> Scale:
    """Return a run in numbers, by its largest block."""
    checkpoint, model = skeleton.checkpoint, skeleton.model.config
    largest = max(range(skeleton.num_blocks), key=lambda index: skeleton.block_numel(index))
    block, calibration, evaluate = skeleton.blocks[largest], config.calibration, config.evaluate
    stored = checkpoint.matrix_dtype()
    groups = likely_groups(block, config.prune.skip, model.hidden_size)
    work = Workload(
        groups=shapes_of(block, groups),
        left=shapes_left(skeleton, groups),
        hidden=model.hidden_size,
        num_blocks=skeleton.num_blocks,
        num_sequences=calibration.sequences,
        num_tokens=calibration.tokens,
        batch=config.compute.batch,
        dtype_bytes=skeleton.dtype.itemsize,
        stored_bytes=stored.itemsize,
    )
    return Scale(
        work=work,
        recipe=config.prune.steps,
        names=tuple(tuple(linear.name for linear in group) for group in groups),
        block_numel=skeleton.block_numel(largest),
        outside_numel=_outside_numel(skeleton),
        vocab_size=skeleton.vocab_size,
        dtype=skeleton.dtype,
        stored=stored,
        unified=skeleton.device.type == "cpu",
        windows=(evaluate.windows, evaluate.sequence_length) if evaluate and evaluate.windows else None,
        surveys=config.prune.allocation.needs_survey,
        generation=generation_of(config, skeleton),
    )


def generation_of(config: RunConfig, skeleton: Skeleton) -> Generation | None:
    """What the model has to write; None where it is not to, or has written in an earlier session of the run."""
    source, model = config.calibration.source, skeleton.model.config.get_text_config()
    if not isinstance(source, WrittenByModel) or (config.output / TOKENS_NAME).is_file():
        return None
    known, heads = model.to_dict(), model.num_attention_heads
    width = known.get("head_dim") or model.hidden_size // heads
    num_written = config.calibration.sequences - (source.self.given or 0)
    return Generation(
        num_sequences=num_written,
        batch=min(source.self.batch, num_written),
        numel=sum(prod(skeleton.checkpoint.tensors[name].shape) for name in skeleton.stored_name.values()),
        cache_numel=2 * skeleton.num_blocks * (known.get("num_key_value_heads") or heads) * width,
        stored_bytes=skeleton.checkpoint.total_bytes(),
    )


def _outside_numel(skeleton: Skeleton) -> int:
    """Numbers in the largest weight outside the blocks: embedding and head are never held together."""
    inside = f"{skeleton.block_prefix}."
    shapes = (skeleton.checkpoint.tensors[name].shape for own, name in skeleton.stored_name.items()
              if not own.startswith(inside))  # fmt: skip
    return max(torch.Size(shape).numel() for shape in shapes)
