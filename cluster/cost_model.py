"""How long pruning takes on an accelerator, from the shapes of a model and from what the hardware sustains.

What there is to do is counted in `planning.work`, and divided here by sustained rates. Held against published times
this is right for SparseGPT (OPT-175B on an A100: 3.76 h, published about 4 h) and far too low for BESA's own code
(half an hour for its data flow, published 5 h): good for comparing topologies, not for promising a duration.
"""

from dataclasses import dataclass

import torch

from cluster.job_shape import BlockCost, JobShape
from pipeline.methods.step import Step
from pipeline.planning.methods_work import count_recipe, made_bytes
from pipeline.planning.work import (
    Count,
    Linears,
    Pruning,
    Workload,
    count_again,
    count_collect,
    count_propagate,
    statistics_bytes,
)
from pipeline.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What an accelerator sustains."""

    flops_gemm: float
    """Operations per second of a block's matrix products, in its dtype."""

    flops_gram: float
    """Of float32 products: Gram matrices, and SparseGPT's updates."""

    flops_factor: float
    """Of float32 factorisations."""

    flops_double: float
    """Of float64 products."""

    bytes_per_s: float
    """Of its memory."""

    seconds_per_column: float = 90e-6
    """SparseGPT's step from one column to the next: launches, not arithmetic."""


A100 = Gpu(flops_gemm=218e12, flops_gram=105e12, flops_factor=11e12, flops_double=13e12, bytes_per_s=1.5e12)
"""60-70% of the peak; TF32 for float32 products, which PyTorch uses only where it is allowed to (16e12 if not)."""

H100 = Gpu(flops_gemm=600e12, flops_gram=300e12, flops_factor=25e12, flops_double=40e12, bytes_per_s=2.6e12)
"""60-70% of the peak; TF32 for float32 products, which PyTorch uses only where it is allowed to (45e12 if not)."""


def llama_groups(hidden: int, kv: int, ffn: int) -> tuple[Linears, ...]:
    """Return the linears of a LLaMA block: q, k and v; o; gate and up; down. `kv` is the width of keys."""
    return (((hidden, hidden), (kv, hidden), (kv, hidden)), ((hidden, hidden),), ((ffn, hidden),) * 2, ((hidden, ffn),))


def shape_of_job(
    work: Workload, recipe: Recipe, gpu: Gpu, *, read_bytes_per_s: float, write_bytes_per_s: float
) -> JobShape:
    """Work out what a recipe takes, its steps one after the other."""
    prunings = count_recipe(work, recipe)
    again = seconds_of(count_again(work, recipe), gpu)  # every replica has its part of the sequences, as of collecting
    prune = sum(seconds_of(pruning.whole, gpu) for pruning in prunings)
    gathered = statistics_bytes(work, recipe)
    forward, dense_forward = (seconds_of(count_propagate(of), gpu) for of in (work.cut, work))
    weight_bytes, left_bytes = (of.num_weights * work.dtype_bytes for of in (work, work.cut))
    block = BlockCost(
        read=weight_bytes / read_bytes_per_s,
        collect=seconds_of(count_collect(work, recipe), gpu) + again,
        prune=prune,
        commit=left_bytes / write_bytes_per_s,
        propagate=forward,
        dense_forward=dense_forward,
        weight_bytes=weight_bytes,
        statistics_bytes=gathered,
        solved_bytes=sum(pruning.solved_bytes for pruning in prunings),
    )
    return JobShape(
        blocks=(block,) * work.num_blocks,
        num_sequences=work.num_sequences,
        batch=work.batch,
        boundary_bytes=work.boundary_bytes,
        num_boundaries=recipe.num_boundaries,
        needs_dense_stream=recipe.needs_dense_stream,
        replicated=sum(_replicated_seconds(pruning, gpu) for pruning in prunings) / prune if prune else 0.0,
        gradient_bytes=max((pruning.gradient_bytes for pruning in prunings), default=0),
        num_updates=sum(pruning.num_updates for pruning in prunings),
        working_bytes=gathered
        + max(
            (
                made_bytes(recipe, i, work.cut.num_weights, work.dtype_bytes)
                + _step_bytes(work if step is recipe.narrowing else work.cut, step)
                for i, step in enumerate(recipe.at_work)
            ),
            default=0,
        ),
        activation_bytes=_activation_bytes(work),
    )


def seconds_of(count: Count, gpu: Gpu) -> float:
    """Return how long an accelerator computes."""
    return (
        count.gemm / gpu.flops_gemm
        + count.gram / gpu.flops_gram
        + count.factor / gpu.flops_factor
        + count.double / gpu.flops_double
        + count.double_factor / (gpu.flops_double * gpu.flops_factor / gpu.flops_gram)
        + count.columns * gpu.seconds_per_column
        + count.memory / gpu.bytes_per_s
    )


def _replicated_seconds(pruning: Pruning, gpu: Gpu) -> float:
    """What any number of replicas does not shorten: what each of them does, and the longest piece."""
    pieces = [seconds_of(piece, gpu) for piece in pruning.pieces]
    return seconds_of(pruning.repeated, gpu) + max(pieces, default=0.0)


def _step_bytes(work: Workload, step: Step) -> int:
    """What a step makes and holds, where blocks run."""
    names = [[f"{i}.{j}" for j in range(len(group))] for i, group in enumerate(work.groups)]
    pairs = zip(names, work.groups, strict=True)
    shapes = {name: shape for own, group in pairs for name, shape in zip(own, group, strict=True)}
    return step.working_bytes(shapes, names, torch.bfloat16 if work.dtype_bytes == 2 else torch.float32)


def _activation_bytes(work: Workload) -> int:
    widest = max(max(linear) for group in work.groups for linear in group)
    return work.batch * work.num_tokens * (4 * work.hidden + 3 * widest) * work.dtype_bytes
