"""What choosing blocks takes, counted against what the ways of choosing really ask for."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.config import parse_config
from pipeline.methods.structured.depth import Dropped, ends, greedy_by_rounds, rescored
from pipeline.methods.structured.narrowing import Comp
from pipeline.methods.structured.shape_step import Depth, ShortGpt
from pipeline.planning.choosing import Choosing, choosing_attentions, choosing_of, planned_shape
from pipeline.planning.plan import Plan, make_plan
from pipeline.skeleton import Skeleton
from tests.tiny import save_tiny


@pytest.mark.parametrize("num_dropped", [1, 3])
def test_models_and_blocks_are_those_that_are_run(num_dropped: int) -> None:
    run: list[int] = []
    tried: list[Dropped] = []

    def survey(gone: Dropped) -> list[float]:
        run.append(8 - len(gone))
        return [0.0] * 8

    def losses(gone: Dropped, candidates: Sequence[int]) -> list[float]:
        live = [block for block in range(8) if block not in gone]
        after = [len(live) - 1 - live.index(block) for block in candidates]
        run.append(sum(after) + live.index(candidates[-1]))  # what is before the last of them is run once
        tried.extend(gone | {block} for block in candidates)
        return [0.0] * len(candidates)

    rescored(survey, 8, num_dropped, ends(8))
    expected = Choosing(models=len(run), embedded=len(run), blocks=sum(run), evaluates=False)
    assert choosing_of(ShortGpt(depth="rescored"), 8, num_dropped) == expected
    run.clear()
    greedy_by_rounds(losses, range(8), num_dropped, ends(8))
    expected = Choosing(models=len(tried), embedded=num_dropped, blocks=sum(run), evaluates=True)
    assert choosing_of(ShortGpt(depth="greedy"), 8, num_dropped) == expected
    assert choosing_of(ShortGpt(), 8, num_dropped) == Choosing(models=1, embedded=1, blocks=8, evaluates=False)


def test_widths_of_single_blocks_take_a_survey_whatever_else_is_run() -> None:
    once = Choosing(models=1, embedded=1, blocks=8, evaluates=False)
    assert [choosing_of(Comp(widths="per_block", depth=depth), 8, 0) for depth in get_args(Depth)] == [once] * 3
    assert choosing_of(Comp(widths="per_block"), 8, 2) == once
    losses = choosing_of(Comp(depth="greedy"), 8, 2)
    both = choosing_of(Comp(depth="greedy", widths="per_block"), 8, 2)
    assert both == replace(losses, embedded=2 + 1, blocks=losses.blocks + 8, surveys=True)


@pytest.mark.parametrize("depth", ["one_shot", "greedy"])
def test_a_plan_counts_the_survey_that_widths_take(depth: Depth, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")

    def plan_of(**options: Any) -> Plan:
        recipe = [{"comp": {"ratio": 0.4, "depth": depth, "depth_fraction": 0.9, **options}}, "wanda"]
        raw = {"model": str(tmp_path / "model"), "output": str(tmp_path / "run"), "prune": {"recipe": recipe}}
        raw |= {"calibration": {"sequences": 6, "tokens": 24}, "compute": {"device": "cpu"}, "evaluate": None}
        return make_plan(parse_config(raw, "test"), tmp_path / "model", None, 10**6)

    even, uneven = plan_of(), plan_of(widths="per_block")
    more = 1.5 if depth == "greedy" else 0  # three blocks, and two are left
    assert uneven.forward_passes == pytest.approx(even.forward_passes + more, abs=0.02)  # one neuron of 64 wider
    assert "survey" in uneven.working_sets
    masks = [
        next(own.held["masks and new weights"] for own in p.phases if own.name == "commit") for p in (even, uneven)
    ]
    assert masks == [even.block_weights - (48 - 39) * 96, even.block_weights], "one of them may keep all its neurons"
    assert (uneven.widths_differ, even.widths_differ) == (True, False)
    assert 0.4 <= uneven.part_gone < even.part_gone, "two widths come nearer to what is asked than one"
    assert (uneven.width, even.width) == (40, 39), "the mean of 39 and 40, rounded"


@pytest.mark.parametrize("num_silent", [1, 2, 3])
def test_choosing_attentions_takes_about_what_any_order_takes(num_silent: int) -> None:
    def run(order: tuple[int, ...]) -> int:
        """Blocks: for each candidate those from it on, and once those before the last candidate."""
        live = [[block for block in range(8) if block not in order[:round]] for round in range(num_silent)]
        return sum(sum(8 - block for block in candidates) + max(candidates) for candidates in live)

    orders = [run(order) for order in permutations(range(8), num_silent)]
    planned = choosing_attentions(8, num_silent)
    assert min(orders) <= planned.blocks <= max(orders)
    assert planned.blocks == pytest.approx(sum(orders) / len(orders), rel=0.02)
    assert (planned.models, planned.embedded) == (sum(8 - round for round in range(num_silent)), num_silent)


@pytest.mark.parametrize(
    ("depth", "passes", "phase"), [("one_shot", 3, "survey"), ("rescored", 3, "survey"), ("greedy", 2, "choose")]
)
def test_a_plan_is_of_the_smaller_model_and_counts_the_choice(
    depth: Depth, passes: int, phase: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    recipe = [{"shortgpt": {"ratio": 0.4, "depth": depth}}, "wanda"]
    raw = {"model": str(tmp_path / "model"), "output": str(tmp_path / "run"), "prune": {"recipe": recipe}}
    raw["evaluate"] = {"windows": 3, "sequence_length": 20}
    config = parse_config(raw | {"calibration": {"sequences": 6, "tokens": 24}, "compute": {"device": "cpu"}}, "test")
    plain = parse_config(raw | {"prune": {"recipe": ["wanda"]}, "compute": {"device": "cpu"}}, "test")
    plan, dense = (make_plan(own, tmp_path / "model", None, 10**6) for own in (config, plain))
    assert (plan.num_blocks, dense.num_blocks) == (2, 3)
    assert plan.output_bytes < dense.output_bytes
    assert phase in plan.working_sets
    evaluations = [next(own.bytes_read for own in one.phases if own.name == "evaluate") for one in (plan, dense)]
    assert evaluations == [(2 + 3) * plan.block_weights * 4, (3 + 3) * plan.block_weights * 4]
    chosen = next(own for own in plan.phases if own.name == "choose")
    assert chosen.bytes_read == passes * plan.block_weights * 4
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "shape.json").write_text('{"kept": [0, 2]}')
    later = make_plan(config, tmp_path / "model", None, 10**6)
    assert later.forward_passes == pytest.approx(plan.forward_passes - passes / 2)
    assert "choose" not in [own.name for own in later.phases]


def test_a_recipe_that_drops_nothing_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    dense = Skeleton(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float32)
    config = parse_config({"model": str(tmp_path), "output": str(tmp_path / "run")}, "test")
    assert planned_shape(config, dense) == (dense, None)
