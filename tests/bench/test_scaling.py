"""Laws of the simulated LLaMA-2-70B table, its agreement with figures worked out by hand, and predictions."""

import sys
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.cost_model import A100, H100, Gpu
from cluster.forecast import Links, forecast
from cluster.job_shape import JobShape
from tests.bench.scaling import (
    GPUS,
    HEADER,
    LAYOUTS,
    LLAMA_2_70B,
    NVLINK,
    Method,
    Row,
    job_of,
    predict,
    rows,
    topology_of,
)

pytestmark = pytest.mark.bench

INSTANT = Links(handoff_bytes_per_s=float("inf"), allreduce_bytes_per_s=float("inf"))


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return list(rows())


def by_layout(table: list[Row]) -> dict[tuple[int, str, Method], dict[tuple[str, int, int], Row]]:
    """The rows of many GPUs: by number, kind and method, then by handoff, stages and replicas."""
    found: dict[tuple[int, str, Method], dict[tuple[str, int, int], Row]] = defaultdict(dict)
    for row in (row for row in table if row.num_gpus > 1):
        layout = (row.topology.handoff, row.topology.num_stages, row.topology.replicas)
        found[row.num_gpus, row.gpu, row.method][layout] = row
    return found


def by_hand(method: Method, gpu: Gpu) -> JobShape:
    """The job of the figures worked out by hand: computation only, with optimised kernels.

    Collecting takes a whole forward pass, BESA's targets are dense, and a column step of SparseGPT takes 8 us.
    """
    job = job_of(method, replace(gpu, seconds_per_column=8e-6))
    forward = job.blocks[0].dense_forward
    collect = {"wanda": forward, "sparsegpt": 0.27 * forward + job.blocks[0].collect, "besa": 2 * forward}[method]
    block = replace(job.blocks[0], read=0, commit=0, collect=collect)
    return replace(job, blocks=(block,) * len(job.blocks))


def test_the_table_has_every_method_layout_and_gpu(table: list[Row]) -> None:
    sys.stdout.write("\n" + HEADER + "".join(f"{row}\n" for row in table))
    assert len(table) == 3 * len(GPUS) * sum(len(layouts) for layouts in LAYOUTS.values())
    assert all(row.topology.num_workers == row.num_gpus for row in table)
    assert all(str(row).count("|") == HEADER.splitlines()[0].count("|") for row in table)


def test_replicas_beat_stages_where_the_handoff_is_pruned(table: list[Row]) -> None:
    for (num_gpus, *_), layouts in by_layout(table).items():
        stages, replicas = layouts["pruned", num_gpus, 1], layouts["pruned", 1, num_gpus]
        assert replicas.expected.seconds < stages.expected.seconds


def test_dense_stages_beat_replicas_where_the_handoff_is_pruned(table: list[Row]) -> None:
    for (num_gpus, *_), layouts in by_layout(table).items():
        dense, replicas = layouts["dense", num_gpus, 1], layouts["pruned", 1, num_gpus]
        assert dense.expected.seconds < replicas.expected.seconds


@pytest.mark.parametrize("gpu", GPUS)
def test_pruned_stages_are_at_most_twice_as_fast_for_wanda(gpu: str) -> None:
    job = job_of("wanda", GPUS[gpu])
    speeds = [forecast(job, topology_of(job, "pruned", n, 1), INSTANT).speed_up for n in (1, 2, 8, 40, 80)]
    assert all(fewer < more for fewer, more in pairwise(speeds))
    assert speeds[0] == pytest.approx(1)
    assert speeds[-1] < 2


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_dense_stages_make_besa_faster_almost_as_their_number(gpu: str, num_stages: int) -> None:
    job = job_of("besa", GPUS[gpu])
    speed_up = forecast(job, topology_of(job, "dense", num_stages, 1), NVLINK).speed_up
    assert 0.6 * num_stages <= speed_up <= num_stages


# Minutes of the whole model, computation only: (method, GPU, handoff, stages, replicas, minutes). "One GPU", then
# samples split over replicas (SparseGPT's rows split, its factorisation replicated), then a block a stage.
BY_HAND: list[tuple[Method, Gpu, int, int, float]] = [
    ("wanda", A100, 1, 1, 5.6), ("wanda", H100, 1, 1, 2.1), ("sparsegpt", A100, 1, 1, 17), ("sparsegpt", H100, 1, 1, 7),
    ("besa", A100, 1, 1, 18.5), ("besa", H100, 1, 1, 7.1),
    ("wanda", A100, 1, 2, 2.8), ("wanda", A100, 1, 8, 0.7), ("wanda", H100, 1, 4, 0.5),
    ("sparsegpt", A100, 1, 2, 10.6), ("sparsegpt", A100, 1, 8, 5.7), ("sparsegpt", H100, 1, 8, 2.4),
    ("besa", A100, 1, 2, 9.3), ("besa", A100, 1, 8, 2.3), ("besa", H100, 1, 8, 0.9),
    ("wanda", A100, 80, 1, 2.9), ("wanda", H100, 80, 1, 1.1), ("sparsegpt", A100, 80, 1, 14.4),
    ("sparsegpt", H100, 80, 1, 5.8),
]  # fmt: skip


@pytest.mark.parametrize(("method", "gpu", "num_stages", "replicas", "minutes"), BY_HAND)
def test_the_simulation_agrees_with_figures_worked_out_by_hand(
    method: Method, gpu: Gpu, num_stages: int, replicas: int, minutes: float
) -> None:
    job = by_hand(method, gpu)
    if method == "sparsegpt":
        factors = sum(4 / 3 * width**3 for width in LLAMA_2_70B.widths) / gpu.flops_factor
        job = replace(job, replicated=factors / job.blocks[0].prune)
    expected = forecast(job, topology_of(job, "pruned", num_stages, replicas), INSTANT)
    assert expected.seconds / 60 == pytest.approx(minutes, rel=0.15)


def test_a_report_of_one_worker_predicts_the_same_job_on_one_worker_and_on_more() -> None:
    report = {"seconds": {"read": 1.0, "collect": 10.0, "prune": 20.0, "commit": 2.0, "propagate": 11.0}}
    job = job_of("wanda", A100)

    def predicted(num_stages: int) -> float:
        topology = topology_of(replace(job, blocks=job.blocks[:30]), "dense", num_stages, 1)
        sizes = {"num_sequences": 16, "batch": 4, "weight_bytes": 10**7, "boundary_bytes": 10**7}
        return predict(report, topology, NVLINK, **sizes).seconds

    assert predicted(1) == pytest.approx(44 - 11 / 30)
    assert predicted(3) < 0.6 * predicted(1)
