"""Runs that take neurons out of every block: the model is really narrower, does what it should, and loads anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GraniteConfig, LlamaConfig, Olmo2Config

from pipeline.anatomy import kept_from_text
from pipeline.errors import ConfigError, VerificationError
from pipeline.ledger import Ledger
from pipeline.verify import verify
from tests.integration.narrow import BOTH_WAYS, KNOWN, NARROW, THEN_WANDA, exchange, settings, zeroed_logits
from tests.integration.narrow import three_blocks as three_blocks
from tests.integration.support import (
    SILENT,
    carry_out,
    evaluation_windows,
    job,
    loaded_whole,
    perplexity_of,
    run_command,
    same_bits,
    tensors_in,
    write_text,
)
from tests.tiny import FAMILIES, GROUPED, save_tiny, some_tokens

OTHERS = {
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "granite": GraniteConfig(**GROUPED, mlp_bias=True),
    "olmo2": Olmo2Config(**GROUPED),
    "llama-biased": LlamaConfig(**GROUPED, mlp_bias=True, attention_bias=True),
}


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in OTHERS.items():
            patch.setitem(FAMILIES, name, config)
        patch.setitem(FAMILIES, "six", LlamaConfig(**{**GROUPED, "num_hidden_layers": 6}))
        yield


@pytest.mark.parametrize("family", [*KNOWN, *OTHERS])
def test_the_output_loads_anywhere_and_is_the_dense_model_without_these_neurons(family: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    report = carry_out(job(tmp_path / "source", tmp_path / "run", NARROW, 0.3))
    tokens, model = some_tokens(2, 20), tmp_path / "run" / "model"
    loaded = loaded_whole(model)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens).logits, zeroed_logits(tmp_path / "source", tmp_path / "run", tokens), rtol=1e-4, atol=1e-4
        )
        loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
    assert loaded.config.intermediate_size < 48
    assert report.perplexity_after == pytest.approx(perplexity_of(loaded, evaluation_windows(tmp_path / "source")))
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_what_goes_is_what_was_asked_counted_from_the_files(tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("six", tmp_path / "source", torch.bfloat16)
    report = carry_out(settings(tmp_path / "source", tmp_path / "run", BOTH_WAYS, 0.4))
    dense, left = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "run" / "model")
    inside = [sum(t.numel() for name, t in tensors.items() if ".layers." in name) for tensors in (dense, left)]
    assert 0.4 <= 1 - inside[1] / inside[0] < 0.42
    provenance = json.loads((tmp_path / "run/model/pruning.json").read_text())
    assert report.smaller is not None
    assert report.smaller.num_blocks == len(provenance["blocks"]["kept"]) == 4
    assert provenance["parameters"] == report.smaller.parameters == sum(t.numel() for t in left.values())
    width = json.loads((tmp_path / "run/model/config.json").read_text())["intermediate_size"]
    assert provenance["blocks"]["width"] == width
    assert [int(kept, 16).bit_count() for kept in provenance["neurons"]["kept"]] == [width] * 4
    said = report.as_json()["guidance"][0]
    assert said.startswith(f"The model is really smaller: 4 of 6 blocks are left, with {width} of 48 neurons each.")
    verified = verify(tmp_path / "run", tmp_path / "source", SILENT)
    assert verified.parameters == sum(t.numel() for t in left.values())
    assert verified.identical_tensors == len(left) - 3 * 4


def test_half_of_what_is_left_is_masked_and_no_less(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, THEN_WANDA, 0.5))
    left = tensors_in(tmp_path / "model")
    matrices = [tensor for name, tensor in left.items() if "proj" in name]
    assert all(2 * int((tensor == 0).sum()) == tensor.numel() for tensor in matrices)
    assert report.achieved == 0.5
    assert report.prunable_weights == sum(tensor.numel() for tensor in matrices)
    assert verify(tmp_path, source, SILENT).pruned_weights == report.pruned_weights


def test_a_pattern_holds_in_what_is_left(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, THEN_WANDA, "2:4", prune={"recipe": THEN_WANDA, "sparsity": "2:4"}))
    verify(tmp_path, source, SILENT)


def test_statistics_gathered_anew_see_the_narrow_block(source: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "within_block": "sequential"}
    report = carry_out(settings(source, tmp_path, THEN_WANDA, prune=prune))
    assert report.achieved == 0.5
    verify(tmp_path, source, SILENT)


def test_mask_tuning_errs_less_than_none_in_every_block_it_is_taken_in(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, NARROW))
    notes = [commit.cut.notes for commit in Ledger.read(tmp_path).commits.values() if commit.cut is not None]
    assert len(notes) == 3
    assert all(n["error_after"] <= n["error_before"] for n in notes)
    assert any(n["recovered"] == 1.0 and n["error_after"] < n["error_before"] for n in notes)
    assert all(n["error_after"] == n["error_before"] for n in notes if n["recovered"] == 0.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_proj", lambda t: t.flip(0), r"gate_proj\.weight was only to lose neurons, but what is left of it diff"),
        ("down_proj", lambda t: t.fill_(float("nan")), r"down_proj\.weight holds NaN or Inf"),
        ("up_proj", lambda t: t[:-1].contiguous(), r"up_proj\.weight is .*, what is left of its source .*\(\d+, 32\)"),
    ],
)
def test_a_model_of_other_neurons_does_not_verify(
    name: str, change: Any, message: str, source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, NARROW))
    exchange(tmp_path / "model", f"model.layers.1.mlp.{name}.weight", change)
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path, source, SILENT)


def test_a_model_of_another_width_than_was_asked_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, NARROW))
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 40}))
    with pytest.raises(VerificationError, match=r"config\.json is not the source's .*, and its neurons"):
        verify(tmp_path, source, SILENT)


def test_only_the_neurons_change_where_nothing_makes_up_for_them(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, ["wanda_sp"]))
    dense, left = tensors_in(source), tensors_in(tmp_path / "model")
    for index, commit in Ledger.read(tmp_path).commits.items():
        assert commit.cut is not None
        keep_U = kept_from_text(commit.cut.kept, 48)
        down = f"model.layers.{index}.mlp.down_proj.weight"
        assert same_bits(left.pop(down), dense[down][:, keep_U].contiguous())
        for maker in ("gate_proj", "up_proj"):
            name = f"model.layers.{index}.mlp.{maker}.weight"
            assert same_bits(left.pop(name), dense[name][keep_U])
    assert all(same_bits(tensor, dense[name]) for name, tensor in left.items())


def test_a_family_whose_neurons_are_not_known_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("gpt2", tmp_path / "source")
    with pytest.raises(ConfigError, match=r"no neurons can be removed from blocks of gpt2 so far, only from those of"):
        carry_out(settings(tmp_path / "source", tmp_path / "run", NARROW))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            {"recipe": THEN_WANDA, "skip": ["mlp.up_proj"]},
            r"skip leaves mlp\.up_proj dense, but removing neurons",
        ),
        (
            {"recipe": [{"comp": {"ratio": 0.3, "depth_fraction": 0.0}}, "wanda"], "sparsity": "2:4"},
            r"mlp\.down_proj has 23 input features, not a multiple of the group of 4",
        ),
        ({"recipe": NARROW, "sparsity": 0.9}, r"leaves \d+\.\d% of the neurons to go, above the most .*, 90%"),
        (
            {"recipe": NARROW, "sparsity": "2:4"},
            r"comp removes neurons and whole blocks, which have no pattern such as 2:4; give a fraction",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    prune: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        carry_out(settings(source, tmp_path, [], prune=prune))


def test_the_command_plans_runs_and_verifies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", NARROW)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["width"], plan["part_gone"]) == (23, pytest.approx(3 * 25 * 32 / 7744))
    assert run_command(["plan", config], monkeypatch) == 0
    assert "3 blocks of 23 neurons; 30.99% of all blocks' parameters go" in " ".join(capsys.readouterr().err.split())
    assert run_command(["run", config], monkeypatch) == 0
    assert "of 48 are left in every block" in " ".join(capsys.readouterr().err.split())
    left = tensors_in(tmp_path / "run" / "model")
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in left.values())
    assert run_command(["verify", tmp_path / "run", "--source", source], monkeypatch) == 0
    gone = sum(t.numel() for t in tensors_in(source).values()) - sum(t.numel() for t in left.values())
    assert f"{gone:,} of" in " ".join(capsys.readouterr().err.split())
