"""Uneven models that are refused: by stock loaders, by steps that need blocks alike, and where they were changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import (
    CheckpointError,
    ConfigError,
    RunDirectoryError,
    UnsupportedCheckpoint,
    VerificationError,
)
from pipeline.ledger import Ledger
from pipeline.uneven import load
from pipeline.verify import verify
from tests.integration.narrow import KNOWN, UNEVEN, UNEVEN_THEN_WANDA, exchange, settings
from tests.integration.narrow import three_blocks as three_blocks
from tests.integration.narrow import untouched_uneven as untouched_uneven
from tests.integration.support import SILENT, RecipeEntries, carry_out, write_text
from tests.tiny import save_tiny


@pytest.mark.parametrize("family", KNOWN)
def test_stock_transformers_refuses_it_and_does_not_load_something_else(family: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    carry_out(settings(tmp_path / "source", tmp_path / "run", UNEVEN))
    model = tmp_path / "run" / "model"
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute and may vary across layers"):
        AutoModelForCausalLM.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    forced = {**config, "allow_global_per_layer_attribute_access": True}
    older = {key: value for key, value in config.items() if key != "per_layer_config"}  # it does not know the setting
    for changed in (forced, older):
        (model / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RuntimeError, match=r"(?s)size mismatch|mismatched sizes|MISMATCH|ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (
            UNEVEN,
            ConfigError,
            r"the blocks of this model have \d+ to \d+ neurons; blocks and neurons can be",
        ),
        (["shortgpt"], UnsupportedCheckpoint, r"llama has blocks of .* parameters; whole blocks can be dropped only"),
    ],
)
def test_more_cannot_be_removed_of_an_uneven_model(
    recipe: RecipeEntries, error: type[Exception], message: str, uneven: Path, tmp_path: Path
) -> None:
    write_text(tmp_path)
    (tmp_path / "model").symlink_to(uneven / "model")
    with pytest.raises(error, match=message):
        carry_out(settings(tmp_path / "model", tmp_path / "run", recipe, 0.4))


def test_a_family_whose_neurons_are_not_known_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("gpt2", tmp_path / "source")
    with pytest.raises(ConfigError, match=r"no neurons can be removed from blocks of gpt2 so far, only from those of"):
        carry_out(settings(tmp_path / "source", tmp_path / "run", UNEVEN))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_widths_that_a_pattern_does_not_divide_are_refused_before_any_block_is_done(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"mlp\.down_proj has \d+ input features, not a multiple of the group of 4"):
        carry_out(settings(source, tmp_path, UNEVEN_THEN_WANDA, "2:4"))
    assert not Ledger.read(tmp_path).commits
    options = {"ratio": 0.3, "depth_fraction": 0.0, "widths": "per_block", "multiple": 4}
    carry_out(settings(source, tmp_path / "fours", [{"comp": options}, "wanda"], "2:4"))
    verify(tmp_path / "fours", source, SILENT)


def test_a_model_of_other_widths_does_not_verify_and_does_not_load(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, [{"comp": {"depth_fraction": 0.0, "widths": "per_block", "spread": 1}}]))
    model, name = tmp_path / "model", "model.layers.2.mlp.up_proj.weight"
    config = json.loads((model / "config.json").read_text())
    swapped = {"0": config["per_layer_config"]["2"], "2": config["per_layer_config"]["0"]}
    changed = {**config, "per_layer_config": config["per_layer_config"] | swapped}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(VerificationError, match=r"config\.json is not the source's .*, and its neurons"):
        verify(tmp_path, source, SILENT)
    with pytest.raises(CheckpointError, match=r"mlp\..*\.weight has shape .* on disk, but config\.json makes it"):
        load(model)
    (model / "config.json").write_text(json.dumps(config))
    exchange(model, name, lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(VerificationError, match=r"up_proj\.weight is .*, what is left of its source .*\(\d+, 32\)"):
        verify(tmp_path, source, SILENT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [w[0] + 1, w[1], w[2]], r"all blocks were to keep \d+ neurons together, and \d+ were asked for"),
        (lambda w: [w[0] + 1, w[1] - 1, w[2]], r"block 0 keeps \d+ neurons, and \d+ were to stay"),
    ],
)
def test_a_ledger_of_other_widths_does_not_verify(
    change: Any, message: str, source: Path, uneven: Path, tmp_path: Path
) -> None:
    found = Ledger.read(uneven)
    shape: Any = found.header.config["shape"]
    changed = {**found.header.config, "shape": {**shape, "width": change(shape["width"])}}
    ledger = Ledger.open(tmp_path, replace(found.header, config=changed))
    for commit in found.commits.values():
        ledger.commit(commit)
    (tmp_path / "model").symlink_to(uneven / "model")
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path, source, SILENT)


def test_a_record_of_other_widths_than_its_figures_give_is_refused(source: Path, tmp_path: Path) -> None:
    own = settings(source, tmp_path, UNEVEN)
    carry_out(own)
    path = tmp_path / "shape.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "width": found["width"][::-1]}))
    with pytest.raises(RunDirectoryError, match=r"the blocks \[0, 1, 2\] with \[.*\] neurons, and its own figures say"):
        carry_out(own)
