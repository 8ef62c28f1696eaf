"""What a job is expected to take, before it has run: from its shapes and a device's usual speeds.

Only ratios matter here: they choose the topology and say how much faster it is than one worker.
"""

from collections.abc import Sequence

from torch import nn

from cluster.cost_model import A100, Gpu, Linears, Workload, shape_of_job
from cluster.job_shape import JobShape
from pipeline.cluster_config import ClusterConfig
from pipeline.job import Source
from pipeline.linears import find_linears
from pipeline.methods.besa import Besa
from pipeline.methods.sparsegpt import SparseGPT

CPU_FLOPS = 40e9
"""Of one CPU thread's float32 products."""

READ_BYTES_PER_S, WRITE_BYTES_PER_S = 1e9, 0.6e9
"""Of a usual cloud disk."""


def shape_of(source: Source, settings: ClusterConfig) -> JobShape:
    """Return a job's costs in seconds and bytes."""
    work = workload_of(source)
    steps = source.config.prune.steps.steps
    besa = next((step for step in steps if isinstance(step, Besa)), None)
    has_gram = any(isinstance(step, SparseGPT) for step in steps)
    return shape_of_job(
        work,
        "besa" if besa is not None else "sparsegpt" if has_gram else "wanda",
        A100 if source.device_type != "cpu" else one_cpu(settings.cpus),
        read_bytes_per_s=READ_BYTES_PER_S,
        write_bytes_per_s=WRITE_BYTES_PER_S,
        dense_targets=besa is not None and besa.needs_dense_stream,
    )


def workload_of(source: Source) -> Workload:
    """Return the shapes of a model's first block, and of what runs through it."""
    skeleton, config = source.skeleton, source.config
    num_sequences, num_tokens = source.calibration.tokens_NT.shape
    return Workload(
        groups=likely_groups(skeleton.blocks[0], config.prune.skip, skeleton.model.config.hidden_size),
        hidden=skeleton.model.config.hidden_size,
        num_blocks=skeleton.num_blocks,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        batch=config.compute.batch,
        dtype_bytes=skeleton.dtype.itemsize,
    )


def likely_groups(block: nn.Module, skip: Sequence[str], hidden: int) -> tuple[Linears, ...]:
    """Return the shapes of a block's linears by the input they seem to share; only running the block tells for sure.

    Within a module (attention, MLP) those of one width share an input, but for the one that leads back to the
    hidden states, which comes last.
    """
    groups: dict[tuple[str, int, bool], list[tuple[int, int]]] = {}
    for linear in find_linears(block, skip):
        rows, columns = linear.weight(block).shape
        parent = linear.name.rpartition(".")[0]
        is_first = not any(other[0] == parent for other in groups)
        leads_back = rows == hidden and not is_first and linear.name == _last_of(block, skip, parent)
        groups.setdefault((parent, columns, leads_back), []).append((rows, columns))
    return tuple(tuple(group) for group in groups.values())


def _last_of(block: nn.Module, skip: Sequence[str], parent: str) -> str:
    return [n.name for n in find_linears(block, skip) if n.name.rpartition(".")[0] == parent][-1]


def one_cpu(num_threads: int) -> Gpu:
    """Return what a worker on a CPU sustains."""
    flops = CPU_FLOPS * num_threads
    return Gpu(flops_gemm=flops, flops_gram=flops, flops_factor=flops / 4, bytes_per_s=5e9, seconds_per_column=10e-6)
