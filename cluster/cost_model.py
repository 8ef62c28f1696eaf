"""What pruning takes, worked out from the shapes of a model and from what its hardware sustains.

Arithmetic and memory traffic are counted and divided by sustained rates. Held against published times this is right
for SparseGPT (OPT-175B on an A100: 3.76 h, published about 4 h) and far too low for BESA's own code (half an hour for
its data flow, published 5 h): good for comparing topologies, not for promising a duration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.job_shape import BlockCost, JobShape

Linears = Sequence[tuple[int, int]]
"""Linears that share one input: (out features, in features) of each."""

NUM_CANDIDATES = 101
"""Candidate sparsities of BESA: a row's parameters, and so the numbers in its gradient."""

SELECTION_BYTES = 80
"""Memory traffic per weight of choosing the smallest of each row: scores, and the passes of a sort."""

MASK_STEP_BYTES = 18
"""Memory traffic per weight and update of BESA: 16-bit ranks, the masked weight, its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What an accelerator sustains."""

    flops_gemm: float
    """Operations per second of a block's matrix products, in its dtype."""

    flops_gram: float
    """Of float32 products: Gram matrices, and SparseGPT's updates."""

    flops_factor: float
    """Of float32 factorisations."""

    bytes_per_s: float
    """Of its memory."""

    seconds_per_column: float = 90e-6
    """SparseGPT's step from one column to the next: launches, not arithmetic."""


A100 = Gpu(flops_gemm=218e12, flops_gram=105e12, flops_factor=11e12, bytes_per_s=1.5e12)
"""60-70% of the peak; TF32 for float32 products, which PyTorch uses only where it is allowed to (16e12 if not)."""

H100 = Gpu(flops_gemm=600e12, flops_gram=300e12, flops_factor=25e12, bytes_per_s=2.6e12)
"""60-70% of the peak; TF32 for float32 products, which PyTorch uses only where it is allowed to (45e12 if not)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model of equal blocks, and the calibration sequences that run through them."""

    groups: tuple[Linears, ...]
    """A block's linears in the order they run."""

    hidden: int
    """Features of the hidden states."""

    num_blocks: int
    num_sequences: int
    num_tokens: int
    """Per sequence."""

    batch: int = 1
    dtype_bytes: int = 2

    @property
    def num_weights(self) -> int:
        """Prunable weights of a block."""
        return sum(_weights(group) for group in self.groups)

    @property
    def num_rows(self) -> int:
        """Out features of all linears of a block."""
        return sum(rows for group in self.groups for rows, _ in group)

    @property
    def widths(self) -> list[int]:
        """Features of each distinct input."""
        return [group[0][1] for group in self.groups]

    @property
    def all_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_sequences * self.num_tokens

    @property
    def forward_flops(self) -> float:
        """One pass of all tokens through a block: its linears, and causal attention."""
        return 2.0 * self.all_tokens * (self.num_weights + self.num_tokens * self.hidden)

    @property
    def collect_flops(self) -> float:
        """The same, ended at the input of the last linears: all that statistics need."""
        return self.forward_flops - 2.0 * self.all_tokens * _weights(self.groups[-1])


def llama_groups(hidden: int, kv: int, ffn: int) -> tuple[Linears, ...]:
    """Return the linears of a LLaMA block: q, k and v; o; gate and up; down. `kv` is the width of keys."""
    return (((hidden, hidden), (kv, hidden), (kv, hidden)), ((hidden, hidden),), ((ffn, hidden),) * 2, ((hidden, ffn),))


def shape_of_job(
    work: Workload,
    recipe: Literal["wanda", "sparsegpt", "besa"],
    gpu: Gpu,
    *,
    read_bytes_per_s: float,
    write_bytes_per_s: float,
    dense_targets: bool = False,
) -> JobShape:
    """Work out what a recipe of one step takes; `dense_targets` is BESA's `target: dense`."""
    recipes: dict[str, Callable[[Workload, Gpu], _Recipe]] = {"wanda": _wanda, "sparsegpt": _sparsegpt, "besa": _besa}
    costs = recipes[recipe](work, gpu)
    has_dense_stream = dense_targets and costs.needs_targets
    forward = work.forward_flops / gpu.flops_gemm
    weight_bytes = work.num_weights * work.dtype_bytes
    block = BlockCost(
        read=weight_bytes / read_bytes_per_s,
        # On the dense stream the block makes the targets, and so on the pruned one only the statistics.
        collect=costs.collect + (work.collect_flops / gpu.flops_gemm if has_dense_stream else 0.0),
        prune=costs.prune,
        commit=weight_bytes / write_bytes_per_s,
        propagate=forward,
        dense_forward=forward,
        weight_bytes=weight_bytes,
        statistics_bytes=costs.statistics_bytes,
        solved_bytes=costs.solved_bytes,
    )
    return JobShape(
        blocks=(block,) * work.num_blocks,
        num_sequences=work.num_sequences,
        batch=work.batch,
        boundary_bytes=work.all_tokens * work.hidden * work.dtype_bytes,
        num_boundaries=2 if costs.needs_targets else 1,
        needs_dense_stream=has_dense_stream,
        replicated=costs.replicated,
        gradient_bytes=costs.gradient_bytes,
        num_updates=costs.num_updates,
        working_bytes=work.num_weights + costs.step_bytes,
        activation_bytes=_activation_bytes(work),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What differs between recipes; the names are those of BlockCost and JobShape."""

    collect: float
    prune: float
    replicated: float
    statistics_bytes: int
    solved_bytes: int = 0
    step_bytes: int
    """Statistics and temporaries of the step, where blocks run."""

    needs_targets: bool = False
    gradient_bytes: int = 0
    num_updates: int = 0


def _wanda(work: Workload, gpu: Gpu) -> _Recipe:
    """Replicas share the rows of each linear, and send each other the masks, a byte a weight."""
    return _Recipe(
        collect=work.collect_flops / gpu.flops_gemm,
        prune=SELECTION_BYTES * work.num_weights / gpu.bytes_per_s,
        replicated=0.0,
        statistics_bytes=8 * sum(work.widths),
        solved_bytes=work.num_weights,
        step_bytes=_selection_bytes(work),
    )


def _sparsegpt(work: Workload, gpu: Gpu) -> _Recipe:
    """Replicas share the linears by input, and send each other masks and weights; the longest to solve is the bound."""
    times = [_sweep_seconds(group, gpu) for group in work.groups]
    gram_numel = sum(width**2 for width in work.widths)
    return _Recipe(
        collect=work.collect_flops / gpu.flops_gemm + 2.0 * work.all_tokens * gram_numel / gpu.flops_gram,
        prune=sum(times),
        replicated=max(times) / sum(times),
        statistics_bytes=4 * gram_numel,
        solved_bytes=(1 + work.dtype_bytes) * work.num_weights,
        step_bytes=4 * gram_numel + 3 * 4 * max(work.widths) ** 2 + work.dtype_bytes * work.num_weights,
    )


def _sweep_seconds(group: Linears, gpu: Gpu) -> float:
    """One factorisation and inverse for all linears of an input; then the columns of each, and their updates."""
    width = group[0][1]
    factor, updates = 4 / 3 * width**3, _weights(group) * width
    return factor / gpu.flops_factor + updates / gpu.flops_gram + len(group) * width * gpu.seconds_per_column


def _besa(work: Workload, gpu: Gpu) -> _Recipe:
    """One epoch, a sequence an update; forward and backward take three passes. Every replica ranks all weights."""
    forward = work.forward_flops / gpu.flops_gemm
    ranking = SELECTION_BYTES * work.num_weights / gpu.bytes_per_s
    updates = 3 * forward + work.num_sequences * MASK_STEP_BYTES * work.num_weights / gpu.bytes_per_s
    gradient_bytes = 4 * NUM_CANDIDATES * work.num_rows
    return _Recipe(
        collect=forward,
        prune=ranking + updates,
        replicated=ranking / (ranking + updates),
        statistics_bytes=8 * sum(work.widths),
        step_bytes=(2 + work.dtype_bytes) * work.num_weights + 10 * gradient_bytes + _selection_bytes(work),
        needs_targets=True,
        gradient_bytes=gradient_bytes,
        num_updates=work.num_sequences,
    )


def _weights(group: Linears) -> int:
    return sum(rows * columns for rows, columns in group)


def _selection_bytes(work: Workload) -> int:
    """Scores in float32 of the largest linear; what sorts them goes by slabs."""
    return 4 * max(rows * columns for group in work.groups for rows, columns in group)


def _activation_bytes(work: Workload) -> int:
    widest = max(max(linear) for group in work.groups for linear in group)
    return work.batch * work.num_tokens * (4 * work.hidden + 3 * widest) * work.dtype_bytes
