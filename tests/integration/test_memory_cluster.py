"""Workers that keep their hidden states on disk make the bytes of those that keep them in memory, and tidy up."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.clusters import BESA_DENSE, alone, carry_out_there, six_blocks, spread
from tests.integration.clusters import warm_ray as warm_ray
from tests.integration.support import RecipeEntries, outcome

pytestmark = pytest.mark.usefixtures("warm_ray")

RECIPE: RecipeEntries = [BESA_DENSE, "sparsegpt"]
"""Both streams go from stage to stage."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_workers_with_hidden_states_on_disk_make_the_same_bytes(handoff: str, source: Path, tmp_path: Path) -> None:
    spools = tmp_path / "spools"
    memory: dict[str, Any] = {"activations": "disk", "spool": str(spools)}
    for name, sections in {"memory": {}, "disk": {"memory": memory}}.items():
        settings = alone(source, tmp_path / name, RECIPE, **sections)
        carry_out_there(spread(settings, stages=2, handoff=handoff))
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    assert spools.is_dir()  # so the disk has been used
    assert list(spools.iterdir()) == []
