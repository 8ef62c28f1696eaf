"""Every method on an accelerator: the run verifies, and what it makes is what the CPU makes, but for rounding.

python -m pytest tests/gpu/test_every_recipe.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunStopped
from pipeline.verify import verify
from tests.integration.smaller import six_blocks as six_blocks
from tests.integration.support import SILENT, RecipeEntries, carry_out, committed, job, outcome, tensors_in

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXACT: list[RecipeEntries] = [
    ["magnitude"],
    ["wanda"],
    ["wanda", {"dsnot": {"criterion": "mean"}}],
    ["wanda", "dsnot"],
    ["sparsegpt"],
    ["admm"],
    ["alps"],
    ["shortgpt"],
    ["sleb"],
    ["wanda_sp"],
    ["flap"],
    ["two_ssp"],
    [{"comp": {"depth_fraction": 0.0}}],
    [{"comp": {"depth_fraction": 0.9, "recovery": "lstsq"}}],
    [{"comp": {"ratio": 0.4, "depth_fraction": 0.0, "heads": 0.5}}, "wanda"],
    [{"comp": {"ratio": 0.3, "depth_fraction": 0.0, "widths": "per_block"}}, "wanda"],
]
"""Recipes without a backward pass, whose bits a resumed run repeats."""

LEARNT: list[RecipeEntries] = [
    ["besa"],
    [{"besa": {"target": "dense"}}, "sparsegpt"],
    [{"besa": {"quantize": {"bits": 4}}}],
    ["wanda", "reconstruct"],
    ["wanda", {"reconstruct": {"gradual": True, "norms": True}}],
]


def settings(source: Path, output: Path, recipe: RecipeEntries, device: str, **sections: Any) -> dict[str, Any]:
    return job(source, output, recipe, 0.5, **{"compute": {"device": device, "dtype": "float32"}, **sections})


@pytest.mark.parametrize("recipe", [*EXACT, *LEARNT], ids=str)
def test_it_verifies_and_is_as_good_as_on_the_cpu(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    there, here = (carry_out(settings(source, tmp_path / d, recipe, d)) for d in (DEVICE, "cpu"))
    verify(tmp_path / DEVICE, source, SILENT)
    assert there.achieved == pytest.approx(here.achieved, abs=0.01)
    assert there.pruned_weights == pytest.approx(here.pruned_weights, rel=0.02)
    assert there.perplexity_before == pytest.approx(here.perplexity_before, rel=1e-4)
    assert there.perplexity_after == pytest.approx(here.perplexity_after, rel=0.05)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"], ids=str)
def test_masks_are_those_of_the_cpu_but_for_ties(sparsity: float | str, source: Path, tmp_path: Path) -> None:
    prune = {"recipe": ["wanda"], "sparsity": sparsity}
    for device in (DEVICE, "cpu"):
        carry_out(settings(source, tmp_path / device, ["wanda"], device, prune=prune))
    there, here = (tensors_in(tmp_path / device / "model") for device in (DEVICE, "cpu"))
    differ = sum(int(((there[name] == 0) != (here[name] == 0)).sum()) for name in here)
    assert differ < 0.002 * sum(tensor.numel() for tensor in here.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", EXACT, ids=str)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    recipe: RecipeEntries, dtype: str, source: Path, tmp_path: Path
) -> None:
    compute = {"device": DEVICE, "dtype": dtype}
    one, many = (settings(source, tmp_path / name, recipe, DEVICE, compute=compute) for name in ("one", "many"))
    carry_out(one)
    with pytest.raises(RunStopped):
        carry_out(many, stop=committed(tmp_path / "many", 2))
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


@pytest.mark.parametrize("recipe", [["wanda"], ["besa"], [{"comp": {"depth_fraction": 0.0}}]], ids=str)
def test_where_hidden_states_are_kept_changes_no_byte(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    ways = {"device": {"activations": "device"}, "host": {"activations": "host"}, "disk": {"activations": "disk"}}
    for name, memory in ways.items():
        carry_out(settings(source, tmp_path / name, recipe, DEVICE, memory=memory))
    assert outcome(tmp_path / "device") == outcome(tmp_path / "host") == outcome(tmp_path / "disk")
