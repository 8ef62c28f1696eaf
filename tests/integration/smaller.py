"""What the tests of smaller models share: a source of six blocks, settings, and what was chosen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.integration.support import RecipeEntries, job, write_text
from tests.tiny import FAMILIES, GROUPED, save_tiny

NUM_BLOCKS = 6
SHORTGPT: RecipeEntries = ["shortgpt"]
SLEB: RecipeEntries = ["sleb"]
THEN_WANDA: RecipeEntries = [{"shortgpt": {"ratio": 0.34}}, "wanda"]


@pytest.fixture(scope="module", name="source")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of six blocks."""
    base = tmp_path_factory.mktemp("fewer")
    write_text(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "six", LlamaConfig(**{**GROUPED, "num_hidden_layers": NUM_BLOCKS}))
        save_tiny("six", base / "source", torch.bfloat16)
    return base / "source"


def settings(source: Path, output: Path, recipe: RecipeEntries, sparsity: float = 0.4, **sections: Any) -> Any:
    """A job without an evaluation."""
    return job(source, output, recipe, sparsity, **{"evaluate": None, **sections})


def kept_of(run_directory: Path) -> list[int]:
    """The blocks that a run has chosen to keep."""
    kept: list[int] = json.loads((run_directory / "shape.json").read_text())["kept"]
    return kept
