"""What a plan of a smaller model says, held against what its run writes and reports."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import parse_config
from pipeline.planning.plan import Plan, make_plan
from tests.integration.narrow import settings
from tests.integration.support import RecipeEntries, carry_out, tensors_in, write_text
from tests.tiny import save_tiny

PARTS: list[RecipeEntries] = [
    [{"comp": {"depth_fraction": 0.0}}],
    [{"comp": {"depth_fraction": 1.0}}],
    [{"comp": {"depth_fraction": 0.4, "widths": "per_block", "multiple": 4}}],
    [{"comp": {"depth_fraction": 0.0, "heads": 0.5}}],
    [{"comp": {"ratio": 0.3, "depth_fraction": 0.0, "recovery": "lstsq"}}, "sparsegpt"],
]
CASES = [(family, recipe) for family in ("llama", "phi3", "qwen2", "gemma2") for recipe in PARTS]


def planned(own: dict[str, Any], source: Path) -> Plan:
    return make_plan(parse_config(own, "the test"), source, None, 10**6)


@pytest.mark.parametrize(("family", "recipe"), [*CASES, ("llama", ["flap"])], ids=str)
def test_a_run_writes_the_bytes_that_were_planned(family: str, recipe: RecipeEntries, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    own = settings(tmp_path / "source", tmp_path / "run", recipe, 0.4)
    plan = planned(own, tmp_path / "source")
    report = carry_out(own)
    left = tensors_in(tmp_path / "run" / "model")
    assert plan.output_bytes == sum(tensor.nbytes for tensor in left.values())
    assert report.smaller is not None
    assert report.smaller.num_bytes == plan.output_bytes
    (commit,) = (phase for phase in plan.phases if phase.name == "commit")
    linears = [tensor for name, tensor in left.items() if ".layers." in name and tensor.dim() == 2]
    rounding = 3 * (3 * 32 * 2) // 2 if "per_block" in str(recipe) else 0  # by the mean width: half a neuron of each
    assert abs(commit.bytes_written - sum(tensor.nbytes for tensor in linears)) <= rounding


@pytest.mark.parametrize("recovery", ["mask", "lstsq"])
def test_hidden_states_move_as_often_as_was_planned(recovery: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source")
    recipe: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "recovery": recovery, "held_out": 0.34}}]
    own = settings(tmp_path / "source", tmp_path / "run", recipe, memory={"activations": "disk"})
    plan = planned(own, tmp_path / "source")
    traffic = carry_out(own).traffic
    phases = {phase.name: phase for phase in plan.phases}
    written = sum(phases[name].bytes_written for name in ("embed", "collect", "fused"))
    assert traffic["hidden_written"] == written
    read = sum(phases[name].bytes_read for name in ("collect", "prune", "fused"))
    one = 24 * 32 * 4  # sequence, which tells the error of every block
    assert traffic["hidden_read"] == read + 3 * one
