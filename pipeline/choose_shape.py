"""Which blocks a run drops, and how wide the others stay: chosen once, before the first is pruned, and recorded.

The model is looked at as it is calibrated: surveyed for how much each block turns the hidden states, or evaluated on
the calibration tokens without each of its blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import JsonValue

from pipeline.block_widths import width_in_words
from pipeline.choose_attentions import choose_attentions, perplexity_without_each
from pipeline.config import RunConfig
from pipeline.errors import RunStopped
from pipeline.head_count import heads_left
from pipeline.importance import ImportanceMeter
from pipeline.looking import Look, look_at
from pipeline.memory import Memory
from pipeline.methods.structured.depth import Dropped, ends, greedy_by_rounds, one_shot, rescored
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.narrower import narrowed
from pipeline.planning.choosing import choosing_of
from pipeline.progress import Progress, StopAsked
from pipeline.shape import Shape
from pipeline.shape_record import Figures, ShapeRecord
from pipeline.silencing import attention_numel, num_silenced
from pipeline.skeleton import Skeleton
from pipeline.splits import Trials, splits_of
from pipeline.survey import survey
from pipeline.try_splits import Prune, Tried, try_splits
from pipeline.width import num_neurons, width_left
from pipeline.without_each import evaluate_without_each
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
    blocks: JsonValue = splits[0] if trials is None else [*splits]
    asked: dict[str, JsonValue] = {"step": step.method, "options": step.model_dump(mode="json"), "blocks": blocks}
    record = ShapeRecord(config.output, {**asked, **settings})
    if trials is not None:
        tried = try_splits(trials, tokens_NT, record, progress, stop_asked, prune)
    num_dropped = splits[0] if tried is None else tried.best
    width, heads = width_left(step, dense, num_dropped, ratio), heads_left(step, dense)
    num_silent, mlp_bias = num_silenced(step, dense, ratio), adds_biases(step, dense, width)
    search = _Search(config, dense, tokens_NT, step, num_dropped, record, progress, stop_asked)
    order = search.order()
    silent = choose_attentions(num_silent, config, dense, tokens_NT, record, progress, stop_asked)
    kept = tuple(block for block in range(dense.num_blocks) if block not in order)
    if step.widths_differ and width is not None:
        width = width_left(step, dense, num_dropped, ratio, search.importance_of(kept))
    shape = Shape(kept=kept, width=width, mlp_bias=mlp_bias, heads=heads, silent=tuple(sorted(silent)))
    record.settle(shape, order)
    if order:
        progress.say(
            f"{step.method}: {num_dropped} of {dense.num_blocks} blocks go, in this order: {', '.join(map(str, order))}"
        )
    if silent:
        progress.say(
            f"{step.method}: the attention of {len(silent)} of {dense.num_blocks} blocks is silenced, in this order: "
            f"{', '.join(map(str, silent))}"
        )
    if width is not None:
        each = f"{width_in_words(width)} of its {num_neurons(dense):,} neurons"
        progress.say(f"{step.method}: every block keeps {each}")
    if heads is not None:
        progress.say(f"{step.method}: every attention keeps {heads}")
    return Chosen(
        shape=shape, num_blocks=dense.num_blocks, order=tuple(order), silent=tuple(silent),
        importance=perplexity_without_each(record) or search.importance(),
        numel=dense.checkpoint.numel(), num_bytes=dense.checkpoint.total_bytes(),
        num_neurons=None if width is None else num_neurons(dense), tried=tried,
        num_idle=num_silent * attention_numel(dense) if num_silent else 0,
    )  # fmt: skip


class _Search:
    """Measures a model without some of its blocks, as often as the order needs and the record does not know."""

    def __init__(
        self,
        config: RunConfig,
        dense: Skeleton,
        tokens_NT: torch.Tensor,
        step: ShapeStep,
        num_dropped: int,
        record: ShapeRecord,
        progress: Progress,
        stop_asked: StopAsked,
    ) -> None:
        self._config, self._dense, self._tokens_NT, self._step = config, dense, tokens_NT, step
        self._num_dropped, self._record, self._progress, self._stop_asked = num_dropped, record, progress, stop_asked
        self._num_told = 0

    def order(self) -> list[int]:
        """Return the blocks that go, in the order they are chosen."""
        num_blocks, protected = self._dense.num_blocks, ends(self._dense.num_blocks)
        if not self._num_dropped:
            return []
        if self._step.depth == "greedy":
            self._progress.begin("choose", choosing_of(self._step, num_blocks, self._num_dropped).models, 0)
            found = greedy_by_rounds(self._losses, range(num_blocks), self._num_dropped, protected)
            self._progress.end()
            return found
        if self._step.depth == "rescored":
            return rescored(self._importance, num_blocks, self._num_dropped, protected)
        return one_shot(self._importance(frozenset()), self._num_dropped, protected)

    def importance(self) -> dict[int, float]:
        """Return what is known of each block beside all others."""
        if self._step.depth == "greedy":
            singly = {name: figures for name, figures in self._record.measured.items() if name.isdigit()}
            return {int(name): figures[0] for name, figures in sorted(singly.items(), key=lambda item: int(item[0]))}
        return dict(enumerate(self._record.measured.get("", [])))

    def importance_of(self, kept: Sequence[int]) -> list[float]:
        """Return how much each of the blocks that stay turns the hidden states of the dense model."""
        found = self._record.measure(frozenset(), lambda: self._surveyed(frozenset()))
        return [found[block] for block in kept]

    def _importance(self, gone: Dropped) -> list[float]:
        """Return the importance of every block of the dense model; of those that are gone it is 0."""
        found = iter(self._record.measure(gone, lambda: self._surveyed(gone)))
        return [0.0 if block in gone else next(found) for block in range(self._dense.num_blocks)]

    def _surveyed(self, gone: Dropped) -> Figures:
        meter, prune = ImportanceMeter(), self._config.prune

        def look(skeleton: Skeleton, memory: Memory) -> None:
            survey(
                skeleton, self._tokens_NT, [meter], skip=prune.skip, batch=self._config.compute.batch, memory=memory,
                progress=self._progress, between_blocks=self._stop_if_asked,
            )  # fmt: skip

        self._with_memory(gone, look)
        return meter.found

    def _losses(self, gone: Dropped, candidates: Sequence[int]) -> list[float]:
        """Return the perplexity on the calibration tokens without the blocks that are gone and each of the others."""
        losses: dict[int, float] = {}

        def found(block: int, perplexity: float) -> None:
            losses[block] = perplexity
            self._num_told += 1
            names = ", ".join(map(str, sorted(gone | {block})))
            self._progress.advance(self._num_told - 1, f"without {names}: {perplexity:.3f}")

        for block in candidates:
            if (known := self._record.known(gone | {block})) is not None:
                found(block, known[0])
        if unknown := [block for block in candidates if block not in losses]:
            self._with_memory(gone, lambda skeleton, memory: self._try_each(gone, unknown, found, skeleton, memory))
        return [losses[block] for block in candidates]

    def _try_each(
        self,
        gone: Dropped,
        candidates: Sequence[int],
        found: Callable[[int, float], None],
        skeleton: Skeleton,
        memory: Memory,
    ) -> None:
        """Measure the model without each of the candidates; `skeleton`: without the blocks that are gone."""
        live = [block for block in range(self._dense.num_blocks) if block not in gone]

        def without(number: int) -> Skeleton:
            return narrowed(self._dense, Shape(kept=(*live[:number], *live[number + 1 :])))

        def measured(number: int, perplexity: float) -> None:
            self._record.measure(gone | {live[number]}, lambda: [perplexity])
            found(live[number], perplexity)

        with memory.phase("choose"):
            evaluate_without_each(
                skeleton, [live.index(block) for block in candidates], without, self._tokens_NT, measured,
                batch=self._config.compute.batch, between_blocks=self._stop_if_asked, memory=memory,
            )  # fmt: skip

    def _with_memory(self, gone: Dropped, look: Look) -> None:
        """Have a look at the model without some blocks, in memory that is opened for it under the run's ceilings."""
        dense = self._dense
        kept = tuple(block for block in range(dense.num_blocks) if block not in gone)
        look_at(
            narrowed(dense, Shape(kept=kept)) if gone else dense, look, config=self._config, dense=dense,
            num_sequences=len(self._tokens_NT),
            choosing=choosing_of(self._step, dense.num_blocks, self._num_dropped),
        )  # fmt: skip

    def _stop_if_asked(self) -> None:
        if self._stop_asked():
            raise RunStopped(
                f"stopped as asked while the blocks that go were chosen; what was measured is kept. Go on with: "
                f"secateur run {self._config.output}"
            )
