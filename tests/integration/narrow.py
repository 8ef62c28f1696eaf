"""What tests of runs that take neurons out of blocks share: recipes and settings."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.anatomy import kept_from_text, mlp_of
from pipeline.checkpoint import Checkpoint
from pipeline.ledger import Ledger
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
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


@torch.no_grad()
def zeroed_logits(source: Path, run_directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the dense model, with the weights that read its neurons as the run has left them, zero where they are gone."""
    commits, written = Ledger.read(run_directory).commits, tensors_in(run_directory / "model")
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        stream, reader = Stream(skeleton, checkpoint), f"{mlp_of(skeleton.model.config).reader}.weight"
        with stream.outside_weights():
            hidden = stream.embed(tokens)
        for index, commit in commits.items():
            assert commit.cut is not None
            block, name = skeleton.load_block(index, checkpoint), skeleton.block_names(index)[reader]
            weight = block.get_parameter(reader).data
            weight.zero_()
            weight[:, kept_from_text(commit.cut.kept, commit.cut.num_neurons)] = written[name].float()
            hidden = stream.run_block(index, hidden)
        with stream.outside_weights():
            return stream.logits(hidden)


def widths_in(model: Path) -> list[int]:
    """Return the neurons of every block of a finished model, counted from its tensors."""
    found = {name: tensor for name, tensor in tensors_in(model).items() if name.endswith("down_proj.weight")}
    return [found[f"model.layers.{block}.mlp.down_proj.weight"].shape[1] for block in range(len(found))]
