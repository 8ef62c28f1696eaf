"""How long the phases of a run take: their counts divided by what this machine's disk, link and arithmetic sustain.

Phases that move batches read ahead and write behind, so the slowest of disk, copying and computing sets their pace,
and is their bottleneck.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from pipeline.errors import StorageError
from pipeline.meter import synchronise
from pipeline.paging.pager import Pager
from pipeline.planning.choosing import Choosing
from pipeline.planning.footprint import Choice
from pipeline.planning.methods_work import SELECTION_TRAFFIC, count_recipe
from pipeline.planning.probes import copy_speed, disk_speed, matmul_flops
from pipeline.planning.scale import Generation, Scale
from pipeline.planning.work import (
    Count,
    Workload,
    count_again,
    count_collect,
    count_commit,
    count_propagate,
    count_read,
    count_survey,
)
from pipeline.sparsity import Unstructured, keep_by_row

PROBED_BYTES = 128 << 20
"""Written to the disk and read back."""

HASHED_BYTES = 1 << 25

DOUBLE_SIZE = 2048
"""Of the matrices that float64 products are measured by: many accelerators are slow at them."""

FACTOR_SHARE = {"cpu": 1 / 4}
"""How fast factorisations are beside float32 products; a tenth where nothing else is known."""

SECONDS_PER_COLUMN = {"cpu": 10e-6}
"""SparseGPT's step from one column to the next; 90 us of launches on an accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a machine sustains, a second."""

    disk_read: float
    """Bytes, past the page cache."""

    disk_write: float
    copy: float
    """Bytes between host and device; of no account on a CPU."""

    gemm: float
    """Operations of matrix products, in the dtype of the run."""

    gram: float
    """Of float32 products."""

    factor: float
    """Of float32 factorisations."""

    double: float
    """Of float64 products."""

    double_factor: float
    """Of float64 factorisations."""

    memory: float
    """Bytes, as choosing the smallest of each row takes them."""

    hash: float
    """Bytes of a shard hashed."""

    seconds_per_column: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one phase takes over the whole run."""

    name: str
    flops: float
    disk_read: int
    disk_written: int
    copied: int
    """Bytes between host and device."""

    seconds: float | None
    """None without speeds."""

    bottleneck: str | None
    """`disk`, `copying` or `computing`."""


def probe_speeds(directory: Path, pager: Pager, device: torch.device, dtype: torch.dtype) -> Speeds:
    """Measure a machine, in some seconds; raises StorageError where the directory cannot be written."""
    size = 1024 if device.type == "cpu" else 8192
    try:
        write, read = disk_speed(directory, pager, PROBED_BYTES)
    except OSError as error:
        raise StorageError(
            f"the disk of {directory} cannot be measured: {error.strerror}; set memory.spool to a directory on a disk "
            f"with room, which this user may write"
        ) from error
    gram = matmul_flops(device, torch.float32, size)
    double = matmul_flops(device, torch.float64, min(size, DOUBLE_SIZE))
    factor_share = FACTOR_SHARE.get(device.type, 1 / 10)
    return Speeds(
        disk_read=read,
        disk_write=write,
        copy=copy_speed(device),
        gemm=gram if dtype == torch.float32 else matmul_flops(device, dtype, size),
        gram=gram,
        factor=gram * factor_share,
        double=double,
        double_factor=double * factor_share,
        memory=_selection_speed(device),
        hash=_hash_speed(),
        seconds_per_column=SECONDS_PER_COLUMN.get(device.type, 90e-6),
    )


def costs(scale: Scale, choice: Choice, speeds: Speeds | None, outside_bytes: int) -> list[Cost]:
    """Return what the phases of a whole run take, in their order. `outside_bytes`: weights outside the blocks."""
    work, recipe, count = scale.work, scale.recipe, scale.work.num_blocks
    collect, propagate = count_collect(work, recipe), count_propagate(work.cut)
    prune = sum((pruning.whole for pruning in count_recipe(work, recipe)), count_again(work, recipe))

    def cost(name: str, once: Count, times: int = count) -> Cost:
        return _cost(scale, choice, speeds, name, once, times)

    outside = Count(weights_read=outside_bytes, weights_written=outside_bytes)
    embedding = scale.outside_numel * scale.stored.itemsize
    embed = Count(weights_read=embedding, hidden_written=work.boundary_bytes)
    phases = [] if scale.generation is None else [cost("generate", _writing(work, scale.generation), 1)]
    choosing = scale.choosing
    num_embedded = scale.works + scale.surveys + (choosing.embedded if choosing else 0)
    phases += [cost("embed", embed, num_embedded)] if num_embedded else []
    phases += [cost("choose", _choosing(scale, choosing), 1)] if choosing else []
    phases += [cost("survey", count_survey(work))] if scale.surveys else []
    if scale.works:  # else blocks are copied as they are, and nothing is run
        phases += [cost("read", count_read(work)), cost("collect", collect, 1 if choice.fused else count)]
        phases += [cost("prune", prune)]
    phases += [cost("commit", count_commit(work, recipe))]
    if scale.works and choice.fused:
        both = propagate + collect
        both = replace(both, hidden_read=both.hidden_read - work.boundary_bytes)
        phases.append(cost("fused", both, count - 1))
    elif scale.works:
        phases.append(cost("propagate", propagate, count - 1))
    if scale.windows is not None:
        phases.append(cost("evaluate", _evaluations(scale, *scale.windows), 1))
    phases.append(cost("assemble", outside, 1))
    return _overlapped(phases) if choice.ahead else phases


def _cost(scale: Scale, choice: Choice, speeds: Speeds | None, name: str, once: Count, times: int) -> Cost:
    hidden = once.hidden_read + once.hidden_written
    on_disk, crosses = choice.tier == "disk", not scale.unified
    disk_read = once.weights_read + (once.hidden_read if on_disk else 0)
    disk_written = once.weights_written + (once.hidden_written if on_disk else 0)
    weights = 0 if name == "assemble" else once.weights_read + once.weights_written
    copied = weights + (hidden if choice.tier != "device" else 0) if crosses else 0
    parts = _parts(once, disk_read, disk_written, copied, speeds) if speeds else {}
    # A shard is hashed, written and flushed in turn; elsewhere all goes on at the same time.
    seconds = None if not parts else times * (sum(parts.values()) if name == "commit" else max(parts.values()))
    return Cost(
        name=name,
        flops=once.flops * times,
        disk_read=disk_read * times,
        disk_written=disk_written * times,
        copied=copied * times,
        seconds=seconds,
        bottleneck=max(parts, key=lambda part: parts[part]) if parts else None,
    )


def _parts(once: Count, disk_read: int, disk_written: int, copied: int, speeds: Speeds) -> dict[str, float]:
    """Seconds by what is kept busy."""
    computing = (
        once.gemm / speeds.gemm + once.gram / speeds.gram + once.factor / speeds.factor
        + once.double / speeds.double + once.double_factor / speeds.double_factor
        + once.columns * speeds.seconds_per_column + once.memory / speeds.memory
        + once.weights_written / speeds.hash
    )  # fmt: skip
    return {
        "computing": computing,
        "disk": disk_read / speeds.disk_read + disk_written / speeds.disk_write,
        "copying": copied / speeds.copy,
    }


def _overlapped(phases: list[Cost]) -> list[Cost]:
    """Where weights are read ahead, reading them costs what it takes beyond all that is done meanwhile."""
    names = ("collect", "prune", "commit", "propagate", "fused")
    meanwhile = sum(phase.seconds or 0.0 for phase in phases if phase.name in names)
    return [
        replace(phase, seconds=max(0.0, phase.seconds - meanwhile))
        if phase.name == "read" and phase.seconds is not None
        else phase
        for phase in phases
    ]


def _writing(work: Workload, generation: Generation) -> Count:
    """Every token of a batch takes every weight from memory once; they are read from disk once."""
    num_steps = -(-generation.num_sequences // generation.batch) * work.num_tokens
    return Count(
        gemm=2.0 * generation.num_sequences * work.num_tokens * generation.numel,
        memory=float(num_steps * generation.numel * work.dtype_bytes),
        weights_read=generation.stored_bytes,
    )


def _choosing(scale: Scale, choosing: Choosing) -> Count:
    """Every model is run over the calibration sequences, block by block, and where it is evaluated through the head."""
    work = scale.work
    block = count_read(work) + count_propagate(work)
    head = 2.0 * work.all_tokens * work.hidden * scale.vocab_size * choosing.models if choosing.evaluates else 0.0
    return Count(gemm=head) + block.times(choosing.blocks)


def _evaluations(scale: Scale, num_windows: int, length: int) -> Count:
    """All blocks and the head over all windows, of the dense model and of the pruned one."""
    work = replace(scale.work, num_sequences=num_windows, num_tokens=length)
    block, tokens = count_read(work) + count_propagate(work), work.all_tokens
    left = count_read(work.cut) + count_propagate(work.cut)
    head = Count(gemm=2.0 * tokens * work.hidden * scale.vocab_size, hidden_read=work.boundary_bytes)
    return block.times(work.num_blocks + scale.num_dropped) + left.times(work.num_blocks) + head.times(2)


def _selection_speed(device: torch.device) -> float:
    """Choose the smaller half of each row of a small matrix."""
    score_OD = torch.rand(512, 8192, device=device, generator=torch.Generator(device).manual_seed(0))
    seconds = _best_of(lambda: keep_by_row(score_OD, Unstructured(ratio=0.5)), device)
    return SELECTION_TRAFFIC * score_OD.numel() / seconds


def _hash_speed() -> float:
    content = bytes(HASHED_BYTES)
    return HASHED_BYTES / _best_of(lambda: hashlib.sha256(content).digest(), torch.device("cpu"))


def _best_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the best of three, after one to warm up."""
    seconds = []
    for _ in range(4):
        began = perf_counter()
        work()
        synchronise(device)
        seconds.append(perf_counter() - began)
    return min(seconds[1:])
