"""Runs that give each block a width of its own: right, saved without a zero more, loaded by us and by nobody else."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.ledger import Ledger
from pipeline.report import HOW_TO_LOAD
from pipeline.uneven import load
from pipeline.verify import verify
from tests.integration.narrow import KNOWN, UNEVEN, settings, widths_in, zeroed_logits
from tests.integration.narrow import three_blocks as three_blocks
from tests.integration.narrow import untouched_uneven as untouched_uneven
from tests.integration.streamed import streamed_logits
from tests.integration.support import (
    SILENT,
    RecipeEntries,
    carry_out,
    evaluation_windows,
    job,
    perplexity_of,
    run_command,
    tensors_in,
    write_text,
)
from tests.tiny import save_tiny, some_tokens


@torch.no_grad()
def check_causal(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """A later token changes no earlier logits, and some from its own place on."""
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 7) % 90 + 4
    difference = (model(tokens).logits - model(other).logits).abs().amax(dim=(0, 2))
    assert difference[:12].max() == 0
    assert difference[12:].min() > 1e-3


@pytest.mark.parametrize("family", KNOWN)
def test_our_loader_gives_the_dense_model_without_these_neurons(family: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    report = carry_out(job(tmp_path / "source", tmp_path / "run", UNEVEN, 0.3))
    tokens, directory = some_tokens(2, 20), tmp_path / "run" / "model"
    assert len(set(widths_in(directory))) > 1
    model = load(directory, torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(logits, streamed_logits(directory, tokens), rtol=0, atol=0)
        wanted = zeroed_logits(tmp_path / "source", tmp_path / "run", tokens)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        cached = model.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
        assert torch.equal(cached, model.generate(tokens[:, :6], max_new_tokens=12, do_sample=False, use_cache=False))
    check_causal(model, tokens)
    assert report.perplexity_after == pytest.approx(perplexity_of(model, evaluation_windows(tmp_path / "source")))
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_what_goes_is_what_was_asked_and_is_told_everywhere(source: Path, uneven: Path) -> None:
    widths, model = widths_in(uneven / "model"), uneven / "model"
    dense, left = tensors_in(source), tensors_in(model)
    inside = [sum(t.numel() for name, t in tensors.items() if ".layers." in name) for tensors in (dense, left)]
    assert 0 <= 1 - inside[1] / inside[0] - 0.3 < 96 / inside[0], "less than a neuron more than was asked"
    config = json.loads((model / "config.json").read_text())
    assert [config["per_layer_config"][str(block)]["intermediate_size"] for block in range(3)] == widths
    assert config["intermediate_size"] == 48
    provenance = json.loads((model / "pruning.json").read_text())
    assert provenance["blocks"]["width"] == provenance["settings"]["shape"]["width"] == widths
    assert [int(kept, 16).bit_count() for kept in provenance["neurons"]["kept"]] == widths
    recorded = json.loads((uneven / "shape.json").read_text())
    assert recorded["width"] == widths
    importance = recorded["measured"][""]
    assert (widths[1] < widths[2]) == (importance[1] < importance[2])
    assert Ledger.read(uneven).header.config["shape"] == {"kept": [0, 1, 2], "width": widths}
    report = json.loads((uneven / "report" / "report.json").read_text())
    assert report["smaller"]["blocks"]["width"] == widths
    told, how = report["guidance"]
    assert f"with {min(widths)} to {max(widths)} of 48 neurons each. It takes less memory" in told
    assert how == HOW_TO_LOAD
    assert "from pipeline.uneven import load" in how


@pytest.mark.parametrize("depth", ["one_shot", "greedy"])
def test_whole_blocks_go_beside_and_masks_come_after(depth: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("qwen3", tmp_path / "source", torch.bfloat16)
    options = {"ratio": 0.4, "depth_fraction": 0.9, "depth": depth, "widths": "per_block", "spread": 0.9}
    report = carry_out(settings(tmp_path / "source", tmp_path / "run", [{"comp": options}, "wanda"], 0.5))
    model = tmp_path / "run" / "model"
    assert report.smaller is not None
    assert (report.smaller.num_blocks, report.achieved) == (2, pytest.approx(0.5, abs=0.01))
    assert len(widths_in(model)) == 2
    assert load(model).config.num_hidden_layers == 2
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_splits_are_tried_with_widths_of_their_own(source: Path, tmp_path: Path) -> None:
    options = {"depth_fraction": "auto", "widths": "per_block", "held_out": 0.4}
    report = carry_out(job(source, tmp_path, [{"comp": options}], 0.4))
    found = json.loads((tmp_path / "shape.json").read_text())
    assert {"0 blocks go", "1 blocks go"} <= set(found["measured"])
    assert found["width"] == widths_in(tmp_path / "model")
    assert report.perplexity_after == pytest.approx(
        perplexity_of(load(tmp_path / "model", torch.float32), evaluation_windows(source))
    )
    verify(tmp_path, source, SILENT)


def test_biases_are_held_in_blocks_of_different_widths(source: Path, tmp_path: Path) -> None:
    report = carry_out(job(source, tmp_path, [{"flap": {"widths": "per_block", "spread": 0.9}}], 0.3))
    model = load(tmp_path / "model", torch.float32)
    widths = widths_in(tmp_path / "model")
    assert len(set(widths)) > 1
    assert [len(block.mlp.gate_proj.bias) for block in model.model.layers] == widths
    assert any(block.mlp.down_proj.bias.count_nonzero() for block in model.model.layers)
    assert report.perplexity_after == pytest.approx(perplexity_of(model, evaluation_windows(source)))
    verify(tmp_path, source, SILENT)


def test_a_fifth_taken_out_unevenly_and_half_of_the_rest_masked(source: Path, tmp_path: Path) -> None:
    recipe: RecipeEntries = [{"comp": {"ratio": 0.2, "widths": "per_block"}}, "wanda"]
    report = carry_out(job(source, tmp_path, recipe, 0.5))
    matrices = [tensor for name, tensor in tensors_in(tmp_path / "model").items() if "proj" in name]
    assert report.prunable_weights == sum(tensor.numel() for tensor in matrices)
    assert sum(int((tensor == 0).sum()) for tensor in matrices) == report.pruned_weights
    assert report.achieved == pytest.approx(0.5, abs=0.01), "rows of odd widths are rounded down"
    assert verify(tmp_path, source, SILENT).pruned_weights == report.pruned_weights
    assert report.perplexity_after == pytest.approx(
        perplexity_of(load(tmp_path / "model", torch.float32), evaluation_windows(source))
    )


def test_what_is_masked_is_spread_over_what_is_left_of_each_block(source: Path, tmp_path: Path) -> None:
    options = {"ratio": 0.3, "depth_fraction": 0.0, "widths": "per_block", "multiple": 8, "spread": 0.9}
    prune = {"recipe": [{"comp": options}, "magnitude"], "sparsity": 0.5, "allocation": {"owl": {"spread": 0.2}}}
    report = carry_out(settings(source, tmp_path, [], prune=prune))
    assert len(set(widths_in(tmp_path / "model"))) > 1
    assert max(report.block_sparsity) - min(report.block_sparsity) > 0.1
    assert report.pruned_weights == pytest.approx(0.5 * report.prunable_weights, abs=3 * 7)  # seven linears a block
    verify(tmp_path, source, SILENT)


def test_an_uneven_model_is_evaluated_and_pruned_as_any_other(
    source: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    text, model = source.parent / "text.txt", uneven / "model"
    command = ["evaluate", model, "--text", text, "--sequence-length", "20", "--windows", "5", "--json"]
    assert run_command(command, monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    wanted = perplexity_of(load(model, torch.bfloat16), evaluation_windows(source))
    assert found == pytest.approx(wanted, rel=0.02)
    (tmp_path / "model").symlink_to(model)
    report = carry_out(job(tmp_path / "model", tmp_path / "run", ["sparsegpt"], 0.5))
    verify(tmp_path / "run", tmp_path / "model", SILENT)
    again = load(tmp_path / "run" / "model", torch.float32)
    assert widths_in(tmp_path / "run" / "model") == widths_in(model)
    assert report.perplexity_after == pytest.approx(perplexity_of(again, evaluation_windows(source)))


def test_widths_that_come_out_equal_make_a_model_that_loads_anywhere(source: Path, tmp_path: Path) -> None:
    flat = [{"comp": {"depth_fraction": 0.0, "widths": "per_block", "spread": 0, "multiple": 8}}]
    report = carry_out(settings(source, tmp_path, flat, 0.29))
    assert "It loads in stock transformers" in report.as_json()["guidance"][0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.intermediate_size == 24
    verify(tmp_path, source, SILENT)


def test_the_command_plans_and_tells_of_widths(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", UNEVEN)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["widths_differ"], plan["width"]) == (True, 24)
    assert run_command(["plan", config], monkeypatch) == 0
    assert "3 blocks of about 24 neurons" in " ".join(capsys.readouterr().err.split())
    assert run_command(["run", config], monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    widths = widths_in(tmp_path / "run" / "model")
    assert f"every block keeps {min(widths)} to {max(widths)} of its 48 neurons" in said
    assert f"{min(widths)} to {max(widths)} of 48 are left in every block" in said
    assert "Load it with secateur" in said
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in tensors_in(tmp_path / "run" / "model").values())
