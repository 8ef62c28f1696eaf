"""What a run will need, from the configuration and the checkpoint's headers alone.

The peaks are those of the data this program holds on purpose: weights of one block, statistics, masks, hidden
states, and the temporaries of the largest step. The interpreter and its libraries come on top.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig
from pipeline.devices import choose_device, choose_dtype
from pipeline.linears import Linear, find_linears
from pipeline.methods.besa import Besa
from pipeline.methods.row_sparsity import NUM_CANDIDATES
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import Step
from pipeline.skeleton import Skeleton
from pipeline.sparsity import SLAB_NUMEL
from pipeline.statistics import Gram
from pipeline.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Figures of a run, before any weight is read."""

    model_type: str
    num_blocks: int
    block_weights: int
    """Prunable weights of the largest block."""

    device: str
    dtype: str
    device_bytes: int
    """Peak of what is held where blocks run, in or outside them; on a CPU this is host memory too."""

    host_bytes: int
    """Peak of what is held in host memory: hidden states, targets, staging."""

    disk_bytes: int
    """Size of the output."""

    forward_passes: float
    """Passes of all calibration sequences through all blocks, counting a backward pass as two."""

    terms: dict[str, int]
    """What is held while the largest block is pruned, in bytes."""

    outside_bytes: int
    """What is held before the blocks are: the embedding, and other weights outside the blocks."""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def make_plan(config: RunConfig, directory: Path) -> Plan:
    """Work out what a run needs; reads headers and config.json, no weight."""
    with closing(Checkpoint.open(directory)) as checkpoint:
        device = choose_device(config.compute.device)
        stored = checkpoint.matrix_dtype()
        dtype = choose_dtype(config.compute.dtype, device, stored)
        skeleton = Skeleton(checkpoint, device, dtype)
        largest = max(range(skeleton.num_blocks), key=lambda i: _block_numel(skeleton, i))
        linears = find_linears(skeleton.blocks[largest], config.prune.skip)
        shapes = {n.name: _shape(skeleton, largest, n) for n in linears}
        terms = _device_terms(config, skeleton, largest, shapes, dtype)
        outside = _outside_numel(skeleton) * dtype.itemsize
        boundary = _boundary_bytes(config, Stream(skeleton, checkpoint).num_features, dtype)
        return Plan(
            model_type=skeleton.model.config.model_type,
            num_blocks=skeleton.num_blocks,
            block_weights=sum(rows * columns for rows, columns in shapes.values()),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            device_bytes=max(sum(terms.values()), outside),
            host_bytes=boundary * _num_boundaries(config),
            disk_bytes=checkpoint.total_bytes(),
            forward_passes=_forward_passes(config),
            terms=terms,
            outside_bytes=outside,
        )


def _block_numel(skeleton: Skeleton, index: int) -> int:
    names = skeleton.block_names(index).values()
    return sum(torch.Size(skeleton.checkpoint.tensors[name].shape).numel() for name in names)


def _outside_numel(skeleton: Skeleton) -> int:
    """Numbers in the largest weight outside the blocks: embedding and head are never held together."""
    inside = f"{skeleton.block_prefix}."
    shapes = (skeleton.checkpoint.tensors[name].shape for own, name in skeleton.stored_name.items()
              if not own.startswith(inside))  # fmt: skip
    return max(torch.Size(shape).numel() for shape in shapes)


def _shape(skeleton: Skeleton, index: int, linear: Linear) -> tuple[int, int]:
    stored = skeleton.checkpoint.tensors[skeleton.block_names(index)[linear.parameter]].shape
    return (stored[1], stored[0]) if linear.transposed else (stored[0], stored[1])


def _device_terms(
    config: RunConfig, skeleton: Skeleton, index: int, shapes: dict[str, tuple[int, int]], dtype: torch.dtype
) -> dict[str, int]:
    steps = config.prune.steps.steps
    numel = sum(rows * columns for rows, columns in shapes.values())
    largest = max(rows * columns for rows, columns in shapes.values())
    width = Stream(skeleton, skeleton.checkpoint).num_features
    tokens = config.compute.batch * config.calibration.tokens
    widest = max(max(shape) for shape in shapes.values())
    terms = {
        "block weights": _block_numel(skeleton, index) * dtype.itemsize,
        "keep masks": numel,
        "activations of one batch": tokens * (4 * width + 3 * widest) * dtype.itemsize,
    }
    if any(step.statistic is Gram for step in steps):
        terms["Gram matrices"] = 4 * sum(columns**2 for columns in {c for _, c in shapes.values()}) * 2
    terms["largest step"] = max(_step_bytes(step, shapes, numel, largest, dtype) for step in steps)
    return terms


def _step_bytes(step: Step, shapes: dict[str, tuple[int, int]], numel: int, largest: int, dtype: torch.dtype) -> int:
    selection = 4 * largest + 16 * min(largest, SLAB_NUMEL)
    if isinstance(step, SparseGPT):
        return 3 * 4 * max(columns for _, columns in shapes.values()) ** 2 + 3 * 4 * largest + dtype.itemsize * numel
    if isinstance(step, Besa):
        rows = sum(rows for rows, _ in shapes.values()) if step.granularity == "row" else len(shapes)
        logits = 10 * 4 * rows * NUM_CANDIDATES  # logits, gradient, softmax, and Prodigy's five tensors
        return numel * (2 + dtype.itemsize) + 2 * largest * dtype.itemsize + logits + selection
    return selection


def _boundary_bytes(config: RunConfig, num_features: int, dtype: torch.dtype) -> int:
    return config.calibration.sequences * config.calibration.tokens * num_features * dtype.itemsize


def _num_boundaries(config: RunConfig) -> int:
    """Pruned stream, and where asked the targets and the dense stream (which serves as targets too)."""
    return 2 if config.prune.steps.needs_targets else 1


def _forward_passes(config: RunConfig) -> float:
    recipe = config.prune.steps
    collect = 1.0 if recipe.statistics or recipe.needs_targets else 1 / config.calibration.sequences
    passes = collect + 1.0 + (1.0 if recipe.needs_dense_stream else 0.0)
    return passes + sum(3.0 * step.epochs for step in recipe.steps if isinstance(step, Besa))
