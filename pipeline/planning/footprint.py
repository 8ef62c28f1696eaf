"""What each phase of a run holds, by place and name: from shapes and settings alone, before any weight is read.

    generate   the whole model, where it writes its calibration text; before all others
    embed      the embedding
    choose     a block, or the head, where the blocks that go are chosen by the model's loss
    survey     the dense block, the input norms, the activations of a batch, and the scores of some rows
    read       a block's weights
    collect    the dense block, statistics, the activations of a batch
    prune      the block, its statistics and masks, and what the largest step works with
    commit     the block, its masks, and one matrix at a time as it is stored
    propagate  the pruned block and the activations of a batch
    fused      propagate of one block and collect of the next at once: both blocks
    evaluate   a block, or the head with a few tokens' logits

Beside each phase's own, hidden states are held throughout, and the next block's weights where they are read ahead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from pipeline.budget import Place
from pipeline.memory_config import Tier
from pipeline.methods.step import Step, largest, num_weights
from pipeline.planning.held import Held, Phase, on_device, on_host
from pipeline.planning.methods_work import made_bytes
from pipeline.planning.scale import Generation, Scale
from pipeline.planning.work import statistics_bytes
from pipeline.sequence_norms import SequenceNorms
from pipeline.sparsity import selection_bytes
from pipeline.statistics import SLAB_NUMEL, ColumnSquares, Gram, Moments

PAGE = 4096
"""Hidden states of each sequence lie at a multiple of it in the spool."""

READ_BUFFERS = 32 << 20
"""Buffers that weights come through from the disk."""

LOGIT_TOKENS = 128
"""Tokens whose logits an evaluation makes at once."""

HEAP_BYTES = 64 << 20
"""The most freed memory that the C library keeps for later: twice its threshold for giving a piece back at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a run uses memory; none of it changes what comes out."""

    tier: Tier
    """Where hidden states are kept."""

    fused: bool
    """Whether a block is propagated, and the next one collected, batch by batch at the same time."""

    ahead: int
    """Blocks whose weights are read ahead: 0, 1 or, while blocks are fused, 2: then the disk never waits."""

    depth: int = 2
    """Batches of each boundary that may be on their way from the spool, and as many on their way to it."""


def footprint(scale: Scale, choice: Choice, baseline: int) -> tuple[Phase, ...]:
    """Return what every phase of a run holds. `baseline`: host bytes of the interpreter and its libraries.

    On a CPU the device's memory is the host's, and all of it is counted there.
    """
    hidden = tuple(_hidden(scale, choice, scale.num_boundaries))
    throughout = (*_reading(scale), *hidden)
    phases = {
        "embed": (*_embed(scale), *hidden),
        "read": (_weights(scale), *_ahead(scale, choice), *throughout),
        "collect": (*_collect(scale), *_ahead(scale, choice), *throughout),
        "prune": (*_prune(scale), *_ahead(scale, choice), *throughout),
        "commit": (*_commit(scale), *_ahead(scale, choice), *throughout),
        "propagate": (*_propagate(scale), *_ahead(scale, choice), *throughout),
    }
    if choice.fused:
        third = _ahead(scale, choice) if choice.ahead > 1 else ()
        phases["fused"] = (*_fused(scale), *third, *throughout)
        del phases["propagate"]
    if scale.surveys or (scale.choosing is not None and (scale.choosing.surveys or not scale.choosing.evaluates)):
        phases["survey"] = (*_survey(scale), *_ahead(scale, choice), *_reading(scale), *_hidden(scale, choice, 1))
    if scale.choosing is not None and scale.choosing.evaluates:
        entering_too = 2  # boundaries: what enters the block that a model is without is kept for the next trial
        phases["choose"] = _evaluate(scale, choice, scale.work.num_sequences, scale.work.num_tokens, entering_too)
    if scale.windows is not None:
        phases["evaluate"] = _evaluate(scale, choice, *scale.windows)
    if scale.generation is not None:
        phases = {"generate": tuple(_generate(scale, scale.generation)), **phases}
    process = on_host("interpreter and libraries", baseline, outlasts=True)
    kept = on_host("freed memory that is kept", _kept_by_heaps(phases.values()), outlasts=True)
    return tuple(Phase(name=name, held=_merged(scale, (process, kept, *held))) for name, held in phases.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a run uses memory, and what each of its phases then holds for as long as it lasts, by name and place."""

    choice: Choice
    working_sets: dict[str, dict[Place, int]]


def _merged(scale: Scale, held: tuple[Held, ...]) -> tuple[Held, ...]:
    """Count device memory as the host's where it is."""
    if not scale.unified:
        return held
    return tuple(replace(h, place="host") if h.place == "device" else h for h in held)


def _hidden(scale: Scale, choice: Choice, count: int) -> Iterator[Held]:
    """Hidden states between blocks, of all sequences, at so many boundaries."""
    work = scale.work
    yield on_host("tokens", 8 * work.all_tokens, outlasts=True)
    yield from _boundaries(choice, count, work.num_sequences, work.boundary_bytes // work.num_sequences, work.batch)


def _boundaries(choice: Choice, count: int, num_sequences: int, sequence_bytes: int, batch: int) -> Iterator[Held]:
    if choice.tier == "disk":
        padded = -(-sequence_bytes // PAGE) * PAGE
        yield Held(place="spool", what="hidden states", num_bytes=count * num_sequences * padded, outlasts=True)
        slots = count * 2 * choice.depth
        yield on_host("buffers of the spool", slots * min(batch, num_sequences) * padded, outlasts=True)
    else:
        place: Place = "device" if choice.tier == "device" else "host"
        yield Held(place=place, what="hidden states", num_bytes=count * num_sequences * sequence_bytes, outlasts=True)


def _reading(scale: Scale) -> Iterator[Held]:
    """What weights come through, kept from the first block to the last; for a device with a block as it is stored."""
    yield on_host("buffers for reading weights", READ_BUFFERS, outlasts=True)
    if not scale.unified:
        yield on_host("the block's weights as stored", scale.block_numel * scale.stored.itemsize, outlasts=True)


def _ahead(scale: Scale, choice: Choice) -> Iterator[Held]:
    """On a CPU the next block, as it will run; for a device it is where every block comes through."""
    if choice.ahead and scale.unified:
        yield on_host("the next block's weights", scale.block_bytes, outlasts=True)


def _embed(scale: Scale) -> Iterator[Held]:
    yield on_device("embedding", scale.outside_numel * scale.dtype.itemsize)
    yield on_device("activations of a batch", 3 * _batch_tokens(scale) * scale.work.hidden * scale.dtype.itemsize)


def _survey(scale: Scale) -> Iterator[Held]:
    yield _weights(scale)
    yield on_device("statistics", sum(ColumnSquares.bytes_of(width) for width in scale.work.widths))
    yield from _squaring(scale)
    yield on_device("activations of a batch", _forward_bytes(scale, _batch_tokens(scale)))
    yield on_device("work of counting outliers", selection_bytes(largest(scale.shapes)))


def _generate(scale: Scale, generation: Generation) -> Iterator[Held]:
    """Tokens are drawn on the host, from logits in float64: as such, scaled, as probabilities and their sums."""
    size, batch, vocabulary = scale.dtype.itemsize, generation.batch, scale.vocab_size
    yield on_device("weights of the whole model", generation.numel * size)
    yield on_device("keys and values", batch * scale.work.num_tokens * generation.cache_numel * size)
    yield on_device("activations of a batch", _forward_bytes(scale, batch) + batch * vocabulary * size)
    yield on_host("work of drawing tokens", batch * vocabulary * (size + 4 * 8))


def _weights(scale: Scale) -> Held:
    return on_device("weights", scale.block_bytes, outlasts=True)


def _collect(scale: Scale) -> Iterator[Held]:
    yield _weights(scale)
    yield from _statistics(scale)
    yield on_device("activations of a batch", _forward_bytes(scale, _batch_tokens(scale)))


def _statistics(scale: Scale) -> Iterator[Held]:
    yield on_device("statistics", statistics_bytes(scale.work, scale.recipe))
    inputs = _batch_tokens(scale) * max(scale.work.widths)
    kinds = {*scale.recipe.statistics, *scale.recipe.neuron_statistics}
    if Gram in kinds and scale.dtype != torch.float32:
        yield on_device("inputs in float32", 4 * inputs)
    if {ColumnSquares, Moments, SequenceNorms} & kinds:
        yield from _squaring(scale)


def _squaring(scale: Scale) -> Iterator[Held]:
    if not scale.unified:
        inputs = _batch_tokens(scale) * max(scale.work.widths)
        yield on_device("inputs in float64, and their squares", 16 * min(inputs, SLAB_NUMEL))


def _prune(scale: Scale) -> Iterator[Held]:
    """At its largest step; what the steps before it have made is held beside its own results."""
    yield _weights(scale)
    yield on_device("statistics", statistics_bytes(scale.work, scale.recipe))
    steps = scale.recipe.at_work
    working, name = max(
        [(_made(scale, i) + _step_bytes(scale, s), type(s).__name__.lower()) for i, s in enumerate(steps)]
        or [(0, "leaving it as it is")]
    )
    yield on_device(f"work of {name}", working)
    if scale.recipe.within_block == "sequential":
        yield on_device("activations of a batch", _forward_bytes(scale, _batch_tokens(scale)))
    if scale.recipe.narrowing is not None and scale.recipe.narrowing.needs_targets:
        yield on_device("activations of a sequence", _forward_bytes(scale, scale.work.num_tokens))
    if scale.recipe.block_steps:
        yield on_device("activations to learn from", _learning_bytes(scale))


def _made(scale: Scale, num_steps: int) -> int:
    return made_bytes(scale.recipe, num_steps, num_weights(scale.shapes_left), scale.dtype.itemsize)


def _step_bytes(scale: Scale, step: Step) -> int:
    shapes = scale.shapes if step is scale.recipe.narrowing else scale.shapes_left
    return step.working_bytes(shapes, scale.names, scale.dtype)


def _commit(scale: Scale) -> Iterator[Held]:
    """A matrix as stored is made where the block's own is in another dtype, or elsewhere."""
    yield _weights(scale)
    yield on_device("masks and new weights", _made(scale, len(scale.recipe.at_work)))
    if scale.dtype != scale.stored or not scale.unified:
        yield on_host("a matrix as stored, and its mask", largest(scale.shapes) * (scale.stored.itemsize + 1))
    yield on_device("activations of a sequence", _forward_bytes(scale, scale.work.num_tokens))


def _propagate(scale: Scale) -> Iterator[Held]:
    yield _weights(scale)
    yield on_device("activations of a batch", _forward_bytes(scale, _batch_tokens(scale)))


def _fused(scale: Scale) -> Iterator[Held]:
    yield on_device("weights of both blocks", 2 * scale.block_bytes, outlasts=True)
    yield from _statistics(scale)
    yield on_device("activations of a batch", _forward_bytes(scale, _batch_tokens(scale)))


def _evaluate(scale: Scale, choice: Choice, num_windows: int, length: int, num_boundaries: int = 1) -> tuple[Held, ...]:
    """A block with a batch, or the head with its logits, in dtype, in float32, and as logarithms of probabilities."""
    size = scale.dtype.itemsize
    sequence_bytes, batch = length * scale.work.hidden * size, min(scale.work.batch, num_windows)
    logits = min(LOGIT_TOKENS, length) * scale.vocab_size * (size + 8)
    boundary = tuple(_boundaries(choice, num_boundaries, num_windows, sequence_bytes, scale.work.batch))
    block = scale.block_bytes + _forward_bytes(scale, batch * length)
    head = scale.outside_numel * size + logits
    weights = (*_ahead(scale, choice), *_reading(scale))
    if head > block + sum(held.num_bytes for held in weights):
        return on_device("head and logits", head), *boundary
    return on_device("weights and activations", block), *weights, *boundary


def _batch_tokens(scale: Scale) -> int:
    return min(scale.work.batch, scale.work.num_sequences) * scale.work.num_tokens


def _forward_bytes(scale: Scale, num_tokens: int) -> int:
    """Live at once where an MLP is widest: its three wide tensors, and four as wide as the hidden states."""
    return num_tokens * (4 * scale.work.hidden + 3 * _widest(scale)) * scale.dtype.itemsize


def _learning_bytes(scale: Scale) -> int:
    """Kept for the backward pass, and live in it: as counted in a LLaMA block; norms and the loss are in float32."""
    size, hidden, work = scale.dtype.itemsize, scale.work.hidden, scale.work
    sequences = max(step.batch for step in scale.recipe.block_steps)
    num_tokens = min(sequences, work.num_sequences) * work.num_tokens
    return num_tokens * (7 * _widest(scale) * size + (8 * size + 20) * hidden)


def _widest(scale: Scale) -> int:
    return max(max(shape) for shape in scale.shapes.values())


def _kept_by_heaps(phases: Iterable[tuple[Held, ...]]) -> int:
    """Activations, temporaries and a growing cache come and go in the C library's heaps, which keep some of it."""
    passing = ("activations", "work of", "keys and values")
    return min(HEAP_BYTES, max(sum(h.num_bytes for h in held if h.what.startswith(passing)) for held in phases))
