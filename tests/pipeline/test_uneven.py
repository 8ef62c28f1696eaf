"""The loader of whole models, on ordinary ones, which transformers loads too; uneven ones are seen in integration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import CheckpointError, UnsupportedCheckpoint
from pipeline.uneven import load
from tests.tiny import FAMILIES, save_tiny, some_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_model_loads_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, torch.bfloat16)
    ours, theirs = load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ours(some_tokens(2, 20)).logits, theirs(some_tokens(2, 20)).logits)
    assert (ours.dtype, ours.training, ours.config.use_cache) == (theirs.dtype, False, theirs.config.use_cache)
    assert ours.generation_config == theirs.generation_config
    parameters = dict(theirs.named_parameters())
    assert {name: (p.shape, p.requires_grad) for name, p in ours.named_parameters()} == {
        name: (p.shape, p.requires_grad) for name, p in parameters.items()
    }


def save_uneven(directory: Path) -> None:
    """Write a llama whose second block lacks the last 8 neurons."""
    save_tiny("llama", directory, shard="1GB")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for own in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{own}.weight"
        tensors[name] = (tensors[name][:, :40] if own == "down_proj" else tensors[name][:40]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    by_block = {"per_layer_config": {"1": {"intermediate_size": 40}}}
    (directory / "config.json").write_text(json.dumps(config | by_block))


def test_a_loaded_model_is_in_the_dtype_that_is_asked_for_and_saves_itself_whole(tmp_path: Path) -> None:
    save_uneven(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    tokens = some_tokens(2, 20)
    assert load(tmp_path / "model", torch.bfloat16).dtype == torch.bfloat16
    model = load(str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert [block.mlp.down_proj.in_features for block in again.model.layers] == [48, 40, 48]


def test_another_attention_may_be_asked_for_later(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    model, tokens = load(tmp_path), some_tokens(2, 20)
    with torch.no_grad():
        before = model(tokens).logits
        model.set_attn_implementation("eager")
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_learns(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    model, tokens = load(tmp_path), some_tokens(2, 20)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is not a whole model directory"):
        load(tmp_path)
    save_uneven(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"] = {"1": {"num_key_value_heads": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match=r"gives single blocks num_key_value_heads of their own"):
        load(tmp_path)
