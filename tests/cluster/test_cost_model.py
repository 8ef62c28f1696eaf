"""LLaMA-2-70B's block in numbers, and its methods against lower bounds that were worked out separately."""

from dataclasses import replace
from typing import Literal

import pytest

from cluster.cost_model import A100, H100, Gpu, llama_groups, shape_of_job
from cluster.job_shape import JobShape
from pipeline.planning.work import Workload
from pipeline.recipe import Recipe, parse_recipe
from pipeline.sparsity import Unstructured

LLAMA = Workload(
    groups=llama_groups(hidden=8192, kv=1024, ffn=28672), hidden=8192, num_blocks=80, num_sequences=128, num_tokens=2048
)
Method = Literal["wanda", "sparsegpt", "besa"]


def recipe_of(*methods: Method, dense_targets: bool = False) -> Recipe:
    target = "dense" if dense_targets else "pruned"
    return parse_recipe([{"besa": {"target": target}} if m == "besa" else m for m in methods], Unstructured(ratio=0.5))


def shape(*methods: Method, gpu: Gpu = A100, dense_targets: bool = False) -> JobShape:
    """Computation only: disks take no time."""
    instant = float("inf")
    recipe = recipe_of(*methods, dense_targets=dense_targets)
    return shape_of_job(LLAMA, recipe, gpu, read_bytes_per_s=instant, write_bytes_per_s=instant)


def test_a_block_has_856_million_weights_and_takes_457_teraflop() -> None:
    assert LLAMA.num_weights == 855_638_016
    assert LLAMA.forward_flops == pytest.approx(457e12, rel=0.01)
    assert LLAMA.collect_flops / LLAMA.forward_flops == pytest.approx(0.73, abs=0.005)


def test_gram_matrices_of_a_block_take_four_gigabytes_and_so_do_its_hidden_states() -> None:
    job = shape("sparsegpt")
    assert job.blocks[0].statistics_bytes == pytest.approx(4.09e9, rel=0.01)
    assert job.boundary_bytes == 2**32
    assert job.num_boundaries == 1


def test_seconds_on_disk_are_those_of_the_weights() -> None:
    job = shape_of_job(LLAMA, recipe_of("wanda"), A100, read_bytes_per_s=2e9, write_bytes_per_s=1e9)
    assert job.blocks[0].weight_bytes == 2 * LLAMA.num_weights
    assert job.blocks[0].read == pytest.approx(0.8556, rel=1e-3)
    assert job.blocks[0].commit == pytest.approx(1.711, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "gpu", "minutes"),
    [("wanda", A100, 5.7), ("wanda", H100, 2.1), ("sparsegpt", A100, 23), ("sparsegpt", H100, 13), ("besa", A100, 18.5),
     ("besa", H100, 7.1)],
)  # fmt: skip
def test_one_gpu_takes_as_long_as_was_worked_out_by_hand(method: Method, gpu: Gpu, minutes: float) -> None:
    # There, statistics take a whole forward pass, linears of one input are swept together, and targets are dense.
    together = sum(LLAMA.widths) / sum(len(group) * group[0][1] for group in LLAMA.groups)
    job = shape(
        method, gpu=replace(gpu, seconds_per_column=together * gpu.seconds_per_column), dense_targets=method == "besa"
    )
    shortened = (LLAMA.forward_flops - LLAMA.collect_flops) / gpu.flops_gemm
    block = job.blocks[0]
    assert (block.seconds + shortened) * 80 / 60 == pytest.approx(minutes, rel=0.04)


@pytest.mark.parametrize(("method", "minutes"), [("wanda", 5.6), ("sparsegpt", 23), ("besa", 18.5)])
def test_one_gpu_is_within_15_percent_of_that_as_it_is_built_here(method: Method, minutes: float) -> None:
    assert shape(method, dense_targets=method == "besa").seconds_alone / 60 == pytest.approx(minutes, rel=0.15)


def test_only_besa_has_targets_updates_and_gradients() -> None:
    jobs = {method: shape(method) for method in ("wanda", "sparsegpt", "besa")}
    assert {name: job.num_boundaries for name, job in jobs.items()} == {"wanda": 1, "sparsegpt": 1, "besa": 2}
    assert {name: job.num_updates for name, job in jobs.items()} == {"wanda": 0, "sparsegpt": 0, "besa": 128}
    assert jobs["besa"].gradient_bytes == 4 * 101 * LLAMA.num_rows
    assert jobs["wanda"].gradient_bytes == jobs["sparsegpt"].gradient_bytes == 0


def test_a_dense_target_costs_besa_a_shortened_pass_and_a_second_stream() -> None:
    pruned, dense = shape("besa"), shape("besa", dense_targets=True)
    added = dense.blocks[0].collect - pruned.blocks[0].collect
    assert added == pytest.approx(LLAMA.collect_flops / A100.flops_gemm)
    assert (pruned.needs_dense_stream, dense.needs_dense_stream) == (False, True)


def test_replicas_share_all_of_wanda_most_of_besa_and_less_than_half_of_sparsegpt() -> None:
    # Of SparseGPT the widest linear, down, is one piece: its factorisation, and a third of all columns.
    shares = {method: shape(method).replicated for method in ("wanda", "besa", "sparsegpt")}
    assert shares["wanda"] == 0
    assert 0 < shares["besa"] < 0.01
    assert shares["sparsegpt"] == pytest.approx(0.54, abs=0.02)


def test_methods_differ_in_memory_as_they_do_in_the_plan() -> None:
    peaks = [shape(method).working_bytes for method in ("wanda", "besa", "sparsegpt")]
    assert peaks == sorted(peaks)
    assert 1e9 < peaks[0] < 3e9
    assert 10e9 < peaks[2] < 20e9


def test_a_recipe_of_two_steps_takes_the_time_of_both_and_gathers_once() -> None:
    besa, sparsegpt, both = shape("besa"), shape("sparsegpt"), shape("besa", "sparsegpt")
    assert both.blocks[0].prune == pytest.approx(besa.blocks[0].prune + sparsegpt.blocks[0].prune)
    assert both.blocks[0].collect < besa.blocks[0].collect + sparsegpt.blocks[0].collect
    assert both.blocks[0].statistics_bytes == besa.blocks[0].statistics_bytes + sparsegpt.blocks[0].statistics_bytes
    alone = besa.replicated * besa.blocks[0].prune + sparsegpt.replicated * sparsegpt.blocks[0].prune
    assert both.replicated * both.blocks[0].prune == pytest.approx(alone)
    assert (both.num_boundaries, both.num_updates, both.gradient_bytes) == (2, 128, besa.gradient_bytes)
