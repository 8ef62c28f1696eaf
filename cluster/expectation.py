"""What a job is expected to take, before it has run: from its shapes and a device's usual speeds.

Only ratios matter here: they choose the topology and say how much faster it is than one worker.
"""

from cluster.cost_model import A100, Gpu, shape_of_job
from cluster.job_shape import JobShape
from pipeline.cluster_config import ClusterConfig
from pipeline.job import Source
from pipeline.planning.left import shapes_left
from pipeline.planning.work import Workload, likely_groups, shapes_of

CPU_FLOPS = 40e9
"""Of one CPU thread's float32 products."""

READ_BYTES_PER_S, WRITE_BYTES_PER_S = 1e9, 0.6e9
"""Of a usual cloud disk."""


def shape_of(source: Source, settings: ClusterConfig) -> JobShape:
    """Return a job's costs in seconds and bytes."""
    return shape_of_job(
        workload_of(source),
        source.config.prune.steps,
        A100 if source.device_type != "cpu" else one_cpu(settings.cpus),
        read_bytes_per_s=READ_BYTES_PER_S,
        write_bytes_per_s=WRITE_BYTES_PER_S,
    )


def workload_of(source: Source) -> Workload:
    """Return the shapes of a model's first block, and of what runs through it."""
    skeleton, config = source.skeleton, source.config
    num_sequences, num_tokens = source.calibration.tokens_NT.shape
    block = skeleton.blocks[0]
    groups = likely_groups(block, config.prune.skip, skeleton.model.config.hidden_size)
    return Workload(
        groups=shapes_of(block, groups),
        left=shapes_left(skeleton, groups),
        hidden=skeleton.model.config.hidden_size,
        num_blocks=skeleton.num_blocks,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        batch=config.compute.batch,
        dtype_bytes=skeleton.dtype.itemsize,
        stored_bytes=skeleton.checkpoint.matrix_dtype().itemsize,
    )


def one_cpu(num_threads: int) -> Gpu:
    """Return what a worker on a CPU sustains."""
    flops = CPU_FLOPS * num_threads
    return Gpu(
        flops_gemm=flops, flops_gram=flops, flops_factor=flops / 4, flops_double=flops / 2, bytes_per_s=5e9,
        seconds_per_column=10e-6,
    )  # fmt: skip
