"""The demo model with its hidden states on disk: the bytes of a run in memory, and ceilings that are kept."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.paging.engines import why_not_aio
from tests.bench.measure import measure
from tests.integration.support import RecipeEntries, carry_out, outcome
from tests.stores import ENGINES, Engine

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/smollm2-135m"
BESA: dict[str, Any] = {"besa": {"batch": 2}}
RECIPES: dict[str, RecipeEntries] = {"wanda": ["wanda"], "sparsegpt": ["sparsegpt"], "besa": [BESA]}
Reference = Callable[[str], dict[str, Any]]

pytestmark = [
    pytest.mark.demo,
    pytest.mark.long,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no demo model here: make demo-model"),
]


def settings(output: Path, method: str, memory: dict[str, Any] | None = None) -> dict[str, Any]:
    """A short calibration, whose batches of 3 do not divide its sequences."""
    return {
        "model": str(MODEL),
        "output": str(output),
        "calibration": {"source": "embedded", "sequences": 5 if method == "besa" else 8, "tokens": 64},
        "prune": {"sparsity": 0.5, "recipe": list(RECIPES[method])},
        "compute": {"threads": 1, "batch": 3},
        "memory": memory or {},
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The outcome of a run without ceilings and in memory, by method."""
    base = tmp_path_factory.mktemp("plain")

    def outcome_of(method: str) -> dict[str, Any]:
        if not (base / method).exists():
            carry_out(settings(base / method, method))
        return outcome(base / method)

    return outcome_of


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", RECIPES)
def test_hidden_states_on_disk_leave_the_bytes_of_a_run_in_memory(
    method: str, engine: Engine, plain: Reference, tmp_path: Path
) -> None:
    if engine == "aio" and (reason := why_not_aio(tmp_path)):
        pytest.skip(reason)
    report = carry_out(settings(tmp_path / "run", method, {"activations": "disk", "io": engine}))
    assert outcome(tmp_path / "run") == plain(method)
    assert report.planned["spool_bytes"]["ratio"] == 1


def planned_host_bytes(config: dict[str, Any], directory: Path) -> int:
    """The peak that `secateur plan` promises, in a process of its own."""
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "plan", str(path), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return int(json.loads(done.stdout)["host_bytes"])


@pytest.mark.parametrize("method", ["wanda", "besa"])
def test_a_ceiling_at_the_plans_own_figure_is_kept(method: str, plain: Reference, tmp_path: Path) -> None:
    memory = {"activations": "disk", "io": "threads"}
    ceiling = planned_host_bytes(settings(tmp_path / "run", method, memory), tmp_path)
    measured = measure(settings(tmp_path / "run", method, {**memory, "host": ceiling}))
    assert measured.peak <= ceiling
    assert outcome(tmp_path / "run") == plain(method)
