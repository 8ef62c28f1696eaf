"""Runs that drop whole blocks: the model is smaller, equals the dense one over its kept blocks, and loads anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import VerificationError
from pipeline.verify import verify
from tests.integration.smaller import NUM_BLOCKS, SHORTGPT, THEN_WANDA, kept_of, settings
from tests.integration.smaller import six_blocks as six_blocks
from tests.integration.streamed import streamed_logits
from tests.integration.support import (
    SILENT,
    carry_out,
    evaluation_windows,
    job,
    load,
    loaded_whole,
    perplexity_of,
    run_command,
    same_bits,
    tensors_in,
    write_text,
)
from tests.tiny import FAMILIES, save_tiny, some_tokens

RELOADED = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = load_file(sys.argv[2])["tokens"]
with torch.no_grad():
    save_file({"tokens": tokens, "logits": model(tokens).logits.contiguous()}, sys.argv[2])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_dense_model_over_its_kept_blocks(family: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    report = carry_out(job(tmp_path / "source", tmp_path / "run", SHORTGPT, 0.4))
    kept, tokens, model = kept_of(tmp_path / "run"), some_tokens(2, 20), tmp_path / "run" / "model"
    assert kept == [0, 2]
    loaded = loaded_whole(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, streamed_logits(tmp_path / "source", tokens, blocks=kept))
        with_cache = loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
        without = loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False, use_cache=False)
    assert with_cache.tolist() == without.tolist()
    assert report.perplexity_after == pytest.approx(perplexity_of(loaded, evaluation_windows(tmp_path / "source")))
    assert verify(tmp_path / "run", tmp_path / "source", SILENT).pruned_tensors == 0


def test_a_fresh_process_loads_the_same_model(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, THEN_WANDA, 0.5))
    tokens = some_tokens(2, 20)
    save_file({"tokens": tokens}, tmp_path / "logits.safetensors")
    command = [sys.executable, "-c", RELOADED, tmp_path / "model", tmp_path / "logits.safetensors"]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        here = load(tmp_path / "model").float()(tokens).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], here)


def test_files_hold_the_kept_blocks_and_nothing_else(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, SHORTGPT))
    dense, left, kept = tensors_in(source), tensors_in(tmp_path / "model"), kept_of(tmp_path)
    assert len(kept) == 4
    for number, block in enumerate(kept):
        for name in (name for name in dense if f"layers.{block}." in name):
            assert same_bits(dense[name], left.pop(name.replace(f"layers.{block}.", f"layers.{number}.")))
    assert all(same_bits(tensor, dense[name]) for name, tensor in left.items())
    assert {name for name in dense if "layers" not in name} == set(left)
    written = sum(tensor.numel() for tensor in tensors_in(tmp_path / "model").values())
    provenance = json.loads((tmp_path / "model" / "pruning.json").read_text())
    smaller = report.smaller
    assert smaller is not None
    assert smaller.parameters == provenance["parameters"] == written
    assert smaller.blocks["parameters_before"] == sum(tensor.numel() for tensor in dense.values())
    assert smaller.num_bytes == 2 * written
    assert provenance["blocks"]["kept"] == kept
    assert sorted([*kept, *provenance["blocks"]["dropped"]]) == list(range(NUM_BLOCKS))
    assert list(provenance["blocks"]["importance"]) == [str(block) for block in range(NUM_BLOCKS)]
    assert (smaller.asked, report.prunable_weights, report.achieved, report.mean_error) == (0.4, 0, 0.0, 0.0)
    assert report.as_json()["guidance"][0].startswith("The model is really smaller: 4 of 6 blocks are left.")


def test_what_is_left_is_masked_as_a_model_of_its_own(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path / "smaller", SHORTGPT, 0.34))
    smaller = tmp_path / "smaller" / "model"
    (tmp_path / "text.txt").write_text((source.parent / "text.txt").read_text())
    alone = settings(smaller, tmp_path / "alone", ["wanda"], 0.5)
    alone["calibration"]["source"] = {"text": str(tmp_path / "text.txt")}
    carry_out(alone)
    report = carry_out(settings(source, tmp_path / "both", THEN_WANDA, 0.5))
    both = tensors_in(tmp_path / "both" / "model")
    assert all(same_bits(both[name], tensor) for name, tensor in tensors_in(tmp_path / "alone" / "model").items())
    assert report.achieved == 0.5
    assert verify(tmp_path / "both", source, SILENT).pruned_weights == report.pruned_weights > 0


def test_a_model_that_lacks_other_blocks_than_its_ledger_says_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, SHORTGPT))
    config = tmp_path / "model" / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}))
    with pytest.raises(VerificationError, match=r"config\.json is not the source's with the blocks taken out"):
        verify(tmp_path, source, SILENT)


def test_the_command_plans_runs_and_verifies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", SHORTGPT)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_blocks"] == 4
    assert plan["forward_passes"] == 6 / 4
    assert [phase["name"] for phase in plan["phases"]] == ["embed", "choose", "commit", "assemble"]
    assert run_command(["run", config], monkeypatch) == 0
    assert "4 of 6 are left" in capsys.readouterr().err
    size = sum(tensor.nbytes for tensor in tensors_in(tmp_path / "run" / "model").values())
    assert plan["output_bytes"] == size
    assert run_command(["verify", tmp_path / "run", "--source", source], monkeypatch) == 0
    said = capsys.readouterr().err
    dense, left = (sum(t.numel() for t in tensors_in(d).values()) for d in (source, tmp_path / "run" / "model"))
    assert f"{dense - left:,} of {dense:,} parameters are gone" in " ".join(said.split())
