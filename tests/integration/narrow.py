"""What tests of runs that take neurons out of blocks share: recipes and settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.anatomy import kept_from_text
from pipeline.ledger import Ledger
from tests.integration.streamed import streamed_logits
from tests.integration.support import RecipeEntries, job, tensors_in

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
