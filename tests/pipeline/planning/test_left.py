"""What a plan says of narrow blocks, held against blocks that are narrow and what running and cutting them takes."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.attention import HeadLayout
from pipeline.checkpoint import Checkpoint
from pipeline.config import parse_config
from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.narrowing import Comp
from pipeline.methods.structured.recovery import DAMPINGS
from pipeline.methods.structured.selection import Rounds, select
from pipeline.narrower import narrowed
from pipeline.planning.left import shapes_left
from pipeline.planning.methods_work import count_prune
from pipeline.planning.plan import make_plan
from pipeline.planning.work import Workload, likely_groups, shapes_of
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
from tests.correlated import normal
from tests.heads import families_with_heads
from tests.tiny import save_tiny

CPU = torch.device("cpu")


def counted(flops: FlopCounterMode, *names: str) -> int:
    """Operations of some kinds of products."""
    found = flops.get_flop_counts()["Global"]
    return sum(number for kind, number in found.items() if str(kind) in names)


def added_in_place(
    target: Sequence[int], left: Sequence[int], right: Sequence[int], *, out_shape: Sequence[int], alpha: int
) -> int:
    """Operations of a product that is added to a matrix, which the counter does not know of itself."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma2"])
def test_shapes_are_those_of_a_narrow_block_and_so_is_its_arithmetic(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        dense = Skeleton(checkpoint, CPU, torch.float32)
        skeleton = narrowed(dense, Shape(kept=(0, 1, 2), width=20))
        groups = likely_groups(dense.blocks[0], (), 32)
        left = shapes_left(skeleton, groups)
        assert shapes_left(dense, groups) is None
        skeleton.reshape_block(0, 20)
        narrow = skeleton.blocks[0].to_empty(device="cpu")
        assert left == shapes_of(narrow, groups)
        for parameter in narrow.parameters():
            parameter.data.zero_()
        work = Workload(groups=left, hidden=32, num_blocks=3, num_sequences=2, num_tokens=12)
        stream = Stream(skeleton, checkpoint)
        stream.run_block(0, torch.zeros(2, 12, 32))  # what blocks are passed is recorded
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            stream.run_block(0, torch.zeros(2, 12, 32))
        attention = 2.0 * work.all_tokens * work.num_tokens * work.hidden
        assert counted(flops, "aten.mm", "aten.addmm") == work.forward_flops - attention


@pytest.mark.parametrize("family", ["h-llama-wide", "h-phi3", "h-qwen2"])
def test_shapes_are_those_of_a_block_with_fewer_heads(family: str, tmp_path: Path) -> None:
    with families_with_heads():
        save_tiny(family, tmp_path)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        dense, heads = Skeleton(checkpoint, CPU, torch.float32), HeadLayout(num_heads=6, num_groups=3, head_dim=8)
        skeleton = narrowed(dense, Shape(kept=(0, 1, 2), width=20, heads=heads))
        groups = likely_groups(dense.blocks[0], (), 64)
        left = shapes_left(skeleton, groups)
        skeleton.reshape_block(0, 20, heads)
        assert left == shapes_of(skeleton.blocks[0], groups)


@pytest.mark.parametrize(("num_rows", "num_neurons", "num_kept"), [(64, 256, 192), (96, 512, 256)])
def test_products_of_a_cut_are_as_many_as_are_counted(num_rows: int, num_neurons: int, num_kept: int) -> None:
    inputs = normal(2 * num_neurons, num_neurons)
    problem = MaskProblem(weight_OD=normal(num_rows, num_neurons, seed=1), gram_DD=inputs.T @ inputs)
    rounds = Rounds(metric="condition", mask_var_max=1.0, at_bound="freeze")
    in_place = {torch.ops.aten.addmm_: added_in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        keep_U = select(problem, num_neurons - num_kept, rounds).keep_U
        for damping in DAMPINGS:
            problem.tuned(keep_U, damping)
    groups = (((num_neurons, num_rows),) * 2, ((num_rows, num_neurons),))
    left = (((num_kept, num_rows),) * 2, ((num_rows, num_kept),))
    work = Workload(groups=groups, left=left, hidden=num_rows, num_blocks=1, num_sequences=8, num_tokens=4)
    measured = counted(flops, "aten.mm", "aten.addmm", "aten.addmm_")
    assert measured == pytest.approx(count_prune(work, Comp()).repeated.double, rel=0.1)


def test_a_plan_counts_narrow_blocks_where_they_are_narrow(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    raw = {
        "model": str(tmp_path / "model"), "output": str(tmp_path / "run"), "compute": {"device": "cpu"},
        "calibration": {"sequences": 6, "tokens": 24}, "evaluate": {"windows": 3, "sequence_length": 20},
    }  # fmt: skip
    recipes = [[{"comp": {"ratio": 0.3, "depth_fraction": 0.0}}, "magnitude"], ["magnitude"]]
    configs = [parse_config(raw | {"prune": {"recipe": recipe}}, "the test") for recipe in recipes]
    cut, dense = (make_plan(config, tmp_path / "model", None, 10**6) for config in configs)
    assert cut.width == 23
    gone = 3 * 32 * (48 - 23)  # weights of a block
    phases, before = ({phase.name: phase for phase in plan.phases} for plan in (cut, dense))
    assert before["commit"].bytes_written - phases["commit"].bytes_written == 3 * gone * 4
    assert before["propagate"].flops - phases["propagate"].flops == 2 * (2 * 6 * 24 * gone)
    assert before["evaluate"].flops - phases["evaluate"].flops == 3 * (2 * 3 * 20 * gone)
    assert before["evaluate"].bytes_read - phases["evaluate"].bytes_read == 3 * gone * 4
    assert before["read"] == replace(phases["read"], held=before["read"].held, host_bytes=before["read"].host_bytes)
    assert before["assemble"].bytes_written == phases["assemble"].bytes_written
