"""The demo model, a real one, over a real Ray: the bytes of one process. Skipped where the model is absent."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.clusters import carry_out_there, is_verified, pruned_alike, spread
from tests.integration.clusters import warm_ray as warm_ray
from tests.integration.support import carry_out, outcome
from tests.integration.test_demo import MODEL

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no demo model here: make demo-model"),
    pytest.mark.usefixtures("warm_ray"),
]


def job(output: Path, recipe: str) -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "output": str(output),
        "calibration": {"source": "embedded", "sequences": 4, "tokens": 64},
        "prune": {"sparsity": 0.5, "recipe": [recipe]},
        "compute": {"dtype": "float32", "threads": 1, "batch": 2},
    }


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this process makes alone."""
    output = tmp_path_factory.mktemp("wanda") / "alone"
    carry_out(job(output, "wanda"))
    return pruned_alike(output)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (3, 1), (1, 2)])
def test_wanda_prunes_as_one_process_does(stages: int, replicas: int, wanda: dict[str, Any], tmp_path: Path) -> None:
    carry_out_there(spread(job(tmp_path, "wanda"), stages=stages, replicas=replicas))
    assert pruned_alike(tmp_path) == wanda


def test_besa_with_three_stages_makes_what_one_process_makes(tmp_path: Path) -> None:
    settings = job(tmp_path / "alone", "besa")
    carry_out(settings)
    carry_out_there(spread(settings, tmp_path / "there", stages=3))
    assert outcome(tmp_path / "there") == outcome(tmp_path / "alone")
    assert is_verified(tmp_path / "there", MODEL)
