"""Which blocks a run drops, and how wide the others stay: chosen once, before the first is pruned, and recorded.

The model is looked at as it is calibrated: surveyed for how much each block turns the hidden states, or evaluated on
the calibration tokens without each of its blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import JsonValue

from pipeline.block_widths import width_in_words
from pipeline.choose_blocks import BlockChoice
from pipeline.config import RunConfig
from pipeline.greedy_search import attentions_of, greedy_order
from pipeline.head_count import heads_left
from pipeline.looking import Looking
from pipeline.narrower import narrowed
from pipeline.planning.choosing import choosing_attentions
from pipeline.progress import Progress, StopAsked
from pipeline.shape import Shape
from pipeline.shape_record import ShapeRecord
from pipeline.silencing import attention_numel, num_silenced
from pipeline.skeleton import Skeleton
from pipeline.splits import Trials, splits_of
from pipeline.try_splits import Prune, Tried, try_splits
from pipeline.width import num_neurons, width_left
from pipeline.zeros import adds_biases


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The shape of a run's output, and how it came about; blocks go by their numbers in the dense model."""

    shape: Shape
    num_blocks: int
    """Of the dense model."""

    order: tuple[int, ...]
    """The blocks that go, in the order they were chosen."""

    silent: tuple[int, ...]
    """The blocks whose attention is silenced, likewise."""

    importance: dict[int, float]
    """Of the dense model's blocks: how much each turns the hidden states (the mean of 1 - cos), or what the perplexity
    on the calibration tokens is without it, or without its attention; of all those that were measured."""

    numel: int
    """Numbers in all tensors of the dense model."""

    num_bytes: int
    """Their size."""

    num_neurons: int | None = None
    """Of every block of the dense model, where some of them go."""

    tried: Tried | None = None
    """What was found of other splits between blocks and neurons, where some were tried."""

    num_idle: int = 0
    """Parameters of the attentions that are silenced."""

    def as_data(self) -> dict[str, JsonValue]:
        """Return plain data, as reports have it."""
        told = self.shape.as_data()
        return {
            "of": self.num_blocks,
            "dropped": list(self.order),
            "kept": told["kept"],
            **({} if self.num_neurons is None else {"width": told["width"], "neurons": self.num_neurons}),
            **({"mlp_bias": True} if self.shape.mlp_bias else {}),
            **({} if self.shape.heads is None else {"heads": asdict(self.shape.heads)}),
            **({} if self.tried is None else {"tried": self.tried.as_data()}),
            **({"attentions_silenced": list(self.silent), "parameters_idle": self.num_idle} if self.silent else {}),
            "importance": {str(block): value for block, value in self.importance.items()},
            "parameters_before": self.numel,
            "bytes_before": self.num_bytes,
        }


def choose_shape(
    config: RunConfig,
    dense: Skeleton,
    tokens_NT: torch.Tensor,
    settings: dict[str, JsonValue],
    progress: Progress,
    stop_asked: StopAsked,
    prune: Prune,
) -> Chosen:
    """Choose the blocks that stay, or go by what an earlier session has measured; the run's lock is held.

    settings: what the choice depends on beside the recipe; prune: carries out a run, where several are tried. Raises
    ConfigError where the ratio is not one of blocks, ConfigChanged and RunDirectoryError as `ShapeRecord` does, and
    RunStopped between blocks.
    """
    recipe, target = config.prune.steps, config.prune.target
    step = recipe.shape
    assert step is not None, "the recipe removes blocks"
    ratio = recipe.part_removed(target)
    splits, trials, tried = splits_of(step, dense, ratio), Trials.of(config, dense), None
    if splits[-1]:
        narrowed(dense, Shape(kept=(0, dense.num_blocks - 1)))  # what cannot be narrowed is not surveyed first
    num_asked: JsonValue = splits[0] if trials is None else [*splits]
    asked: dict[str, JsonValue] = {
        "step": step.method, "options": step.model_dump(mode="json"), "part": float(ratio), "blocks": num_asked,
        "within_block": config.prune.within_block,
    }  # fmt: skip
    record = ShapeRecord(config.output, {**asked, **settings})
    if trials is not None:
        tried = try_splits(trials, tokens_NT, record, progress, stop_asked, prune)
    num_dropped = splits[0] if tried is None else tried.best
    width, heads = width_left(step, dense, num_dropped, ratio), heads_left(step, dense)
    num_silent, mlp_bias = num_silenced(step, dense, ratio), adds_biases(step, dense, width)
    looking = Looking(config=config, dense=dense, tokens_NT=tokens_NT, progress=progress, stop_asked=stop_asked)
    blocks, attentions = BlockChoice(step, num_dropped, looking, record), attentions_of(dense)
    order = blocks.order()
    choosing = choosing_attentions(dense.num_blocks, num_silent)
    silent = greedy_order(attentions, num_silent, choosing, looking, record)
    kept = tuple(block for block in range(dense.num_blocks) if block not in order)
    if step.widths_differ and width is not None:
        width = width_left(step, dense, num_dropped, ratio, blocks.importance_of(kept))
    shape = Shape(kept=kept, width=width, mlp_bias=mlp_bias, heads=heads, silent=tuple(sorted(silent)))
    record.settle(shape, order)
    for line in _told(dense, shape, order, silent):
        progress.say(f"{step.method}: {line}")
    return Chosen(
        shape=shape, num_blocks=dense.num_blocks, order=tuple(order), silent=tuple(silent),
        importance=attentions.alone(record) or blocks.importance(),
        numel=dense.checkpoint.numel(), num_bytes=dense.checkpoint.total_bytes(),
        num_neurons=None if width is None else num_neurons(dense), tried=tried,
        num_idle=num_silent * attention_numel(dense) if num_silent else 0,
    )  # fmt: skip


def _told(dense: Skeleton, shape: Shape, order: Sequence[int], silent: Sequence[int]) -> Iterator[str]:
    """Give what was chosen in words."""
    if order:
        yield f"{len(order)} of {dense.num_blocks} blocks go, in this order: {', '.join(map(str, order))}"
    if silent:
        in_order = ", ".join(map(str, silent))
        yield f"the attention of {len(silent)} of {dense.num_blocks} blocks is silenced, in this order: {in_order}"
    if shape.width is not None:
        yield f"every block keeps {width_in_words(shape.width)} of its {num_neurons(dense):,} neurons"
    if shape.heads is not None:
        yield f"every attention keeps {shape.heads}"
