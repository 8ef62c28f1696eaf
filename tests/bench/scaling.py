"""How LLaMA-2-70B would scale over 8, 16 and 64 GPUs: a simulation, driven by the topology code of the real job.

    python -m tests.bench.scaling            # prints a Markdown table

128 sequences of 2048 tokens, one a batch. Every worker has a disk of its own (PCIe 4 NVMe); 8 GPUs share a node and
its NVLink, more are connected by 100 GbE. `predict` makes the forecast of a job that has been measured on one worker.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cluster.cost_model import A100, H100, Gpu, llama_groups, shape_of_job
from cluster.forecast import Forecast, Links, forecast
from cluster.job_shape import JobShape, shape_from_measured
from cluster.topology import Handoff, Topology, partition
from pipeline.planning.work import Workload
from pipeline.recipe import parse_recipe
from pipeline.sparsity import Unstructured

Method = Literal["wanda", "sparsegpt", "besa"]

LLAMA_2_70B = Workload(
    groups=llama_groups(hidden=8192, kv=1024, ffn=28672),
    hidden=8192,
    num_blocks=80,
    num_sequences=128,
    num_tokens=2048,
)

GPUS: dict[str, Gpu] = {"A100": A100, "H100": H100}

READ, WRITE = 6.5e9, 3.0e9
"""Bytes per second of a worker's disk."""

NVLINK = Links(handoff_bytes_per_s=200e9, allreduce_bytes_per_s=200e9)
ETHERNET = Links(handoff_bytes_per_s=11e9, allreduce_bytes_per_s=11e9)

LAYOUTS: dict[int, list[tuple[Handoff, int, int]]] = {
    1: [("pruned", 1, 1)],
    8: [("pruned", 8, 1), ("pruned", 1, 8), ("pruned", 2, 4), ("dense", 8, 1), ("dense", 4, 2)],
    16: [("pruned", 16, 1), ("pruned", 1, 16), ("pruned", 4, 4), ("dense", 16, 1), ("dense", 4, 4)],
    64: [("pruned", 64, 1), ("pruned", 1, 64), ("pruned", 8, 8), ("dense", 64, 1), ("dense", 8, 8)],
}
"""By number of GPUs: handoff, stages, replicas."""

HEADER = """\
| GPUs | method | handoff | stages x replicas | minutes | speed-up | handoff GB | all-reduce GB | peak GB a worker: \
device + host |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    num_gpus: int
    gpu: str
    method: Method
    topology: Topology
    expected: Forecast

    def __str__(self) -> str:
        shape = f"{self.topology.num_stages} x {self.topology.replicas}"
        expected = self.expected
        return (
            f"| {self.num_gpus} {self.gpu} | {self.method} | {self.topology.handoff} | {shape} | "
            f"{expected.seconds / 60:.2f} | {expected.speed_up:.2f} | {expected.handoff_bytes / 1e9:.0f} | "
            f"{expected.allreduce_bytes / 1e9:.0f} | {max(expected.device_bytes) / 1e9:.1f} + "
            f"{max(expected.host_bytes) / 1e9:.1f} |"
        )


def job_of(method: Method, gpu: Gpu) -> JobShape:
    """Return LLaMA-2-70B's shape for a method."""
    recipe = parse_recipe([method], Unstructured(ratio=0.5))
    return shape_of_job(LLAMA_2_70B, recipe, gpu, read_bytes_per_s=READ, write_bytes_per_s=WRITE)


def topology_of(job: JobShape, handoff: Handoff, num_stages: int, replicas: int) -> Topology:
    """Return a topology with stages of equal cost."""
    stages = partition([block.seconds for block in job.blocks], num_stages)
    return Topology(stages=stages, replicas=replicas, handoff=handoff)


def rows() -> Iterator[Row]:
    """Simulate the whole table."""
    for num_gpus, layouts in LAYOUTS.items():
        links = NVLINK if num_gpus <= 8 else ETHERNET
        for name, gpu in GPUS.items():
            for method in get_args(Method):
                job = job_of(method, gpu)
                for layout in layouts:
                    topology = topology_of(job, *layout)
                    yield Row(
                        num_gpus=num_gpus,
                        gpu=name,
                        method=method,
                        topology=topology,
                        expected=forecast(job, topology, links),
                    )


def predict(
    report: Mapping[str, Mapping[str, float]],
    topology: Topology,
    links: Links,
    *,
    num_sequences: int,
    batch: int,
    weight_bytes: int,
    boundary_bytes: int,
) -> Forecast:
    """Forecast a job from the report.json of the same job on one worker: its seconds by phase, over all blocks."""
    per_block = {phase: seconds / topology.num_blocks for phase, seconds in report["seconds"].items()}
    job = shape_from_measured(
        per_block,
        num_blocks=topology.num_blocks,
        num_sequences=num_sequences,
        batch=batch,
        weight_bytes=weight_bytes,
        boundary_bytes=boundary_bytes,
    )
    return forecast(job, topology, links)


def main() -> None:
    """Print the table."""
    sys.stdout.write(HEADER)
    for row in rows():
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
