"""What tests of runs that take neurons out of blocks share: recipes, settings, sources."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.anatomy import MLPS, kept_from_text
from pipeline.ledger import Ledger
from tests.integration.streamed import streamed_logits
from tests.integration.support import RecipeEntries, carry_out, job, tensors_in, write_text
from tests.tiny import FAMILIES, save_tiny

NARROW: RecipeEntries = [{"comp": {"depth_fraction": 0.0}}]
THEN_WANDA: RecipeEntries = [{"comp": {"ratio": 0.3, "depth_fraction": 0.0, "multiple": 8}}, "wanda"]
THEN_BESA: RecipeEntries = [
    {"comp": {"ratio": 0.3, "depth_fraction": 0.0, "recovery": "lstsq"}},
    {"besa": {"target": "dense"}},
    "sparsegpt",
]
UNEVEN: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "widths": "per_block"}}]
UNEVEN_THEN_WANDA: RecipeEntries = [{"comp": {"ratio": 0.3, "depth_fraction": 0.0, "widths": "per_block"}}, "wanda"]
BOTH_WAYS: RecipeEntries = [{"comp": {"depth_fraction": 0.9}}]

KNOWN = [family for family, config in FAMILIES.items() if config.model_type in MLPS]
"""Families whose neurons can be removed."""


@pytest.fixture(scope="module", name="source")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of three blocks."""
    base = tmp_path_factory.mktemp("narrow")
    write_text(base)
    save_tiny("llama", base / "source", torch.bfloat16)
    return base / "source"


@pytest.fixture(scope="module", name="uneven")
def untouched_uneven(source: Path) -> Path:
    """The run directory of a run with a width for each block, which nothing has been done to since."""
    carry_out(settings(source, source.parent / "uneven", UNEVEN))
    return source.parent / "uneven"


def settings(source: Path, output: Path, recipe: RecipeEntries, sparsity: float | str = 0.3, **sections: Any) -> Any:
    return job(source, output, recipe, sparsity, **{"evaluate": None, **sections})


def exchange(model: Path, name: str, change: Any) -> None:
    """Change a tensor of a finished model, where it lies."""
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(model / index[name])
    tensors[name] = change(tensors[name])
    save_file(tensors, model / index[name], metadata={"format": "pt"})


def zeroed_logits(source: Path, run_directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the dense model, with the weights that read its neurons as the run has left them, zero where they are gone."""
    commits, written = Ledger.read(run_directory).commits, tensors_in(run_directory / "model")

    def alter(index: int, block: nn.Module, names: Mapping[str, str]) -> None:
        cut, reader = commits[index].cut, "mlp.down_proj.weight"
        assert cut is not None
        weight = block.get_parameter(reader).data
        weight.zero_()
        weight[:, kept_from_text(cut.kept, cut.num_neurons)] = written[names[reader]].float()

    return streamed_logits(source, tokens, alter)


def widths_in(model: Path) -> list[int]:
    """Return the neurons of every block of a finished model, counted from its tensors."""
    found = {name: tensor for name, tensor in tensors_in(model).items() if name.endswith("down_proj.weight")}
    return [found[f"model.layers.{block}.mlp.down_proj.weight"].shape[1] for block in range(len(found))]
