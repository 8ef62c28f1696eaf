"""What tests of runs that take neurons out of blocks share: recipes and settings."""

from pathlib import Path
from typing import Any

from tests.integration.support import RecipeEntries, job

NARROW: RecipeEntries = [{"comp": {"depth_fraction": 0.0}}]
THEN_WANDA: RecipeEntries = [{"comp": {"ratio": 0.3, "depth_fraction": 0.0, "multiple": 8}}, "wanda"]
THEN_BESA: RecipeEntries = [
    {"comp": {"ratio": 0.3, "depth_fraction": 0.0, "recovery": "lstsq"}},
    {"besa": {"target": "dense"}},
    "sparsegpt",
]
BOTH_WAYS: RecipeEntries = [{"comp": {"depth_fraction": 0.9}}]


def settings(source: Path, output: Path, recipe: RecipeEntries, sparsity: float | str = 0.3, **sections: Any) -> Any:
    return job(source, output, recipe, sparsity, **{"evaluate": None, **sections})
