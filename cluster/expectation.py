"""What a job is expected to take, before it has run: from its shapes and a device's usual speeds, or from its ledger.

Only ratios matter here: they choose the topology and say how much faster it is. Speeds are those of one kind of
device; a job that has committed blocks is judged by what those took.
"""

from cluster.cost_model import A100, Gpu, Workload, shape_of_job
from cluster.job_shape import JobShape
from pipeline.cluster_config import ClusterConfig
from pipeline.job import Source
from pipeline.ledger import Ledger
from pipeline.linears import find_linears
from pipeline.methods.besa import Besa
from pipeline.methods.sparsegpt import SparseGPT

CPU_FLOPS = 40e9
"""Of one CPU thread's float32 products."""

READ_BYTES_PER_S, WRITE_BYTES_PER_S = 1e9, 0.6e9
"""Of a usual cloud disk."""


def shape_of(source: Source, settings: ClusterConfig, ledger: Ledger | None) -> JobShape:
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
    block = skeleton.blocks[0]
    shapes = [linear.weight(block).shape for linear in find_linears(block, config.prune.skip)]
    groups: list[list[tuple[int, int]]] = []
    for rows, columns in shapes:
        if not groups or groups[-1][0][1] != columns:
            groups.append([])
        groups[-1].append((rows, columns))
    num_sequences, num_tokens = source.calibration.tokens_NT.shape
    return Workload(
        groups=tuple(tuple(group) for group in groups),
        hidden=skeleton.model.config.hidden_size,
        num_blocks=skeleton.num_blocks,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        batch=config.compute.batch,
        dtype_bytes=skeleton.dtype.itemsize,
    )


def one_cpu(num_threads: int) -> Gpu:
    """Return what a worker on a CPU sustains."""
    flops = CPU_FLOPS * num_threads
    return Gpu(flops_gemm=flops, flops_gram=flops, flops_factor=flops / 4, bytes_per_s=5e9, seconds_per_column=10e-6)
