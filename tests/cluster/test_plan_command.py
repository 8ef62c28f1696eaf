"""`secateur plan` as its users call it: a table, one JSON object where asked, and a status that scripts can read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests.integration.support import job, run_command, write_text
from tests.tiny import save_tiny

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    write_text(directory)
    save_tiny("llama", directory / "source")
    return directory / "source"


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(source, tmp_path / "run")))
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command; return its status and what it printed. The disk is measured with a megabyte, to be quick."""
    monkeypatch.setattr("cluster.cli.console", Console(stderr=True, width=200))
    monkeypatch.setattr("pipeline.planning.pace.PROBED_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.planning.pace.HASHED_BYTES", 1 << 20)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = run_command(arguments, monkeypatch)
        return (status, *capfd.readouterr())

    return run


def test_plan_prints_one_object_and_leaves_nothing_behind(call: Call, config: Path) -> None:
    before = sorted(config.parent.iterdir())
    status, output, _ = call("plan", config, "--json")
    assert status == 0
    plan = json.loads(output)
    assert (plan["model_type"], plan["num_blocks"], plan["block_weights"]) == ("llama", 3, 7680)
    assert (plan["device"], plan["dtype"], plan["refused"]) == ("cpu", "float32", [])
    assert plan["host_bytes"] == max(phase["host_bytes"] for phase in plan["phases"])
    assert plan["seconds"] > 0
    assert sorted(config.parent.iterdir()) == before


def test_plan_draws_a_table_of_phases_with_totals_and_what_was_chosen(call: Call, config: Path) -> None:
    status, output, said = call("plan", config, "--set", "prune.recipe=[sparsegpt]", "--set", "memory.activations=disk")
    assert (status, output) == (0, "")
    for fact in (
        "llama, 3 blocks of 7,680 prunable weights",
        "hidden states on disk, each block propagated while the next one is collected",
        "the weights of the next two blocks ahead",
        "forward passes of the calibration set",
        "most of it spent",
    ):
        assert fact in said
    rows = [line.split()[0] for line in said.splitlines() if line.strip()]
    first = rows.index("phase")
    names = ["phase", "embed", "read", "collect", "prune", "commit", "fused", "evaluate", "assemble", "in"]
    assert rows[first : first + len(names)] == names


def test_a_plan_of_a_cluster_job_says_that_it_is_of_one_worker(call: Call, config: Path) -> None:
    assert "figures of one worker" not in call("plan", config)[2]
    assert "figures of one worker with all blocks" in call("plan", config, "--set", "cluster.stages=2")[2]


def test_a_plan_that_does_not_fit_says_why_and_has_a_status_of_its_own(call: Call, config: Path) -> None:
    status, output, said = call("plan", config, "--set", "memory.host=1MiB", "--json")
    assert status == 3
    (reason,) = json.loads(output)["refused"]
    assert "above memory.host: 1.05 MB" in reason
    assert f"refused: {reason}" in said
