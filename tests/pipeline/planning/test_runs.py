"""Trials of splits are planned as the runs that they are."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from pipeline.config import RunConfig, parse_config
from pipeline.planning.plan import Plan, make_plan
from tests.tiny import FAMILIES, GROUPED, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "model"
    save_tiny("llama", directory)
    return directory


def planned(model: Path, part: float | str, output: Path, **sections: Any) -> Plan:
    recipe = [{"comp": {"depth_fraction": part, "held_out": 0.3}}]
    raw: dict[str, Any] = {
        "model": str(model), "output": str(output), "prune": {"recipe": recipe, "sparsity": 0.4},
        "calibration": {"sequences": 6, "tokens": 24}, "compute": {"device": "cpu"},
    }  # fmt: skip
    return make_plan(own(raw | sections), model, None, 10**6)


def own(raw: dict[str, Any]) -> RunConfig:
    return parse_config(raw, "the test")


def test_trials_take_what_their_runs_take(model: Path, tmp_path: Path) -> None:
    plan = planned(model, "auto", tmp_path)
    few, judged = {"sequences": 4, "tokens": 24}, {"windows": 2, "sequence_length": 24}
    runs = [planned(model, part, tmp_path, calibration=few, evaluate=judged) for part in (0.0, 1.0)]
    after = planned(model, 0.0, tmp_path)
    assert [run.num_blocks for run in runs] == [3, 2]
    assert (plan.num_trials, after.num_trials, plan.num_blocks) == (2, 0, 3)
    trials = plan.phases[0]
    assert trials.name == "trials"
    for total in ("bytes_read", "bytes_written", "flops"):
        together = sum(getattr(run, total) for run in runs)
        assert getattr(trials, total) == together
        assert getattr(plan, total) == together + getattr(after, total)
    assert trials.host_bytes == max(run.host_bytes for run in runs)
    parts = zip((1, 2 / 3), runs, strict=True)
    passes = sum(4 / 6 * part * run.forward_passes for part, run in parts)
    assert plan.forward_passes == pytest.approx(passes + after.forward_passes)


def test_a_trial_that_does_not_fit_refuses_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "many-words", LlamaConfig(**{**GROUPED, "vocab_size": 4096}))
    save_tiny("many-words", tmp_path / "model")  # its logits: a run without an evaluation never makes them
    recipe = [{"wanda_sp": {"depth_fraction": "auto"}}]
    auto = {"prune": {"recipe": recipe, "sparsity": 0.4}}
    plan = planned(tmp_path / "model", "auto", tmp_path / "run", **auto)
    without = max(phase.host_bytes for phase in plan.phases[1:])
    assert plan.phases[0].host_bytes > without
    refused = planned(tmp_path / "model", "auto", tmp_path / "run", **auto, memory={"host": without + 4096}).refused
    assert refused[0].startswith(("survey needs", "evaluate needs"))


def test_a_choice_that_was_made_is_planned_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text('{"kept": [0, 2]}')
    plan = planned(model, "auto", tmp_path)
    assert (plan.num_trials, plan.num_blocks, plan.phases[0].name) == (0, 2, "embed")
    (tmp_path / "shape.json").write_text('{"kept": []}')  # no split that may be
    assert planned(model, "auto", tmp_path).num_blocks == 3
