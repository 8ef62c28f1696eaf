"""The demo model, a real one: memory held, three kills survived, the result verified. Skipped where it is absent."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.verify import verify
from tests.bench.measure import Measured, measure
from tests.integration.support import digests

MODEL = Path(__file__).parents[2] / "models/smollm2-135m"
LIMIT = 500_000_000
"""Bytes beyond the imports; the model's weights alone take 540 MB in float32."""

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no demo model here: make demo-model"),
]


def job(output: Path, recipe: list[Any]) -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "output": str(output),
        "calibration": {"source": "embedded", "sequences": 8, "tokens": 128},
        "prune": {"sparsity": 0.5, "recipe": recipe},
        "compute": {"dtype": "float32"},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measured]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, measure(job(output, ["besa"]))


def test_besa_prunes_within_less_memory_than_the_models_weights(undisturbed: tuple[Path, Measured]) -> None:
    _, measured = undisturbed
    assert measured.beyond_imports < LIMIT
    assert measured.report["pruned_weights"] == measured.report["prunable_weights"] // 2


def test_wanda_and_sparsegpt_prune_within_less_memory_than_the_models_weights(tmp_path: Path) -> None:
    assert measure(job(tmp_path / "run", ["wanda"])).beyond_imports < LIMIT
    assert measure(job(tmp_path / "other", ["sparsegpt"])).beyond_imports < LIMIT


def test_the_result_verifies_with_every_unpruned_tensor_identical(undisturbed: tuple[Path, Measured]) -> None:
    found = verify(undisturbed[0], MODEL, Silent())
    assert (found.tensors, found.pruned_tensors, found.identical_tensors) == (272, 210, 62)


def kill_instants(seconds: float) -> Iterator[float]:
    generator = random.Random(0)
    for _ in range(3):
        yield generator.uniform(0.05, 0.5) * seconds


def test_three_kills_leave_the_bytes_of_an_undisturbed_run(undisturbed: tuple[Path, Measured], tmp_path: Path) -> None:
    expected, measured = undisturbed
    output, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job(output, ["besa"])))
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "run", str(config)]
    for delay in kill_instants(sum(measured.report["seconds"].values())):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (output / "ledger.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert digests(output / "model") == digests(expected / "model")
    commits = Ledger.read(expected).commits
    assert {i: c.sha256 for i, c in Ledger.read(output).commits.items()} == {i: c.sha256 for i, c in commits.items()}
