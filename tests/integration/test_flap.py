"""Runs that leave biases where neurons were: what they are, where they load, and that nothing changes their bytes."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GraniteConfig, LlamaConfig

from pipeline.anatomy import kept_from_text
from pipeline.errors import ConfigError, VerificationError
from pipeline.ledger import Ledger
from pipeline.verify import verify
from tests.integration.endings import check_killed, check_memory, check_stopped
from tests.integration.narrow import exchange, settings
from tests.integration.streamed import streamed_logits
from tests.integration.support import (
    SILENT,
    RecipeEntries,
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

FLAP: RecipeEntries = ["flap"]
THEN_BESA: RecipeEntries = [
    {"flap": {"ratio": 0.3, "multiple": 8}},
    "besa",
    {"reconstruct": {"norms": True, "epochs": 2}},
]
BIAS = "model.layers.{}.mlp.down_proj.bias"
LLAMAS = {
    "sure": LlamaConfig(**GROUPED),
    "biased": LlamaConfig(**GROUPED, mlp_bias=True, attention_bias=True),
    "stone": GraniteConfig(**GROUPED),
}


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in LLAMAS.items():
            patch.setitem(FAMILIES, name, config)
        yield


def source_of(family: str, base: Path) -> Path:
    """A tiny model whose neurons give much on average, so that a bias helps: their gates are far from zero."""
    write_text(base)
    save_tiny(family, base / "source", torch.bfloat16)
    for shard in (base / "source").glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensors[name] = tensors[name].abs()
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name].abs() + 1
        save_file(tensors, shard, {"format": "pt"})
    return base / "source"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, more_families: None) -> Path:
    return source_of("sure", tmp_path_factory.mktemp("flap"))


def zeroed_logits(source: Path, run_directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the dense model, run block by block with zeros where neurons are gone, and the run's biases added by hand."""
    commits, written = Ledger.read(run_directory).commits, tensors_in(run_directory / "model")

    def alter(index: int, block: nn.Module, names: Mapping[str, str]) -> None:
        cut = commits[index].cut
        assert cut is not None
        block.get_parameter("mlp.down_proj.weight").data[:, ~kept_from_text(cut.kept, cut.num_neurons)] = 0
        old = dict(block.named_parameters()).get("mlp.down_proj.bias")
        added = written[BIAS.format(index)].float() - (0 if old is None else old)
        block.get_submodule("mlp").register_forward_hook(lambda module, args, output: output + added)

    return streamed_logits(source, tokens, alter)


@pytest.mark.parametrize("family", LLAMAS)
def test_the_output_loads_anywhere_and_is_the_dense_model_with_these_biases(family: str, tmp_path: Path) -> None:
    report = carry_out(job(source_of(family, tmp_path), tmp_path / "run", FLAP, 0.3))
    tokens, model = some_tokens(2, 20), tmp_path / "run" / "model"
    loaded = loaded_whole(model)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens).logits, zeroed_logits(tmp_path / "source", tmp_path / "run", tokens), rtol=1e-4, atol=1e-4
        )
        loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
    assert report.perplexity_after == pytest.approx(perplexity_of(loaded, evaluation_windows(tmp_path / "source")))
    provenance = json.loads((model / "pruning.json").read_text())
    assert any(provenance["neurons"]["mended"])
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_only_biases_of_blocks_where_they_help_are_not_zero(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, FLAP))
    dense, left = tensors_in(source), tensors_in(tmp_path / "model")
    commits = Ledger.read(tmp_path).commits
    for index, commit in commits.items():
        assert commit.cut is not None
        helps = commit.cut.notes["recovered"] == 1.0
        assert left.pop(BIAS.format(index)).any() == helps == (commit.tuned == ["mlp.down_proj.bias"])
        assert (commit.cut.notes["error_after"] < commit.cut.notes["error_before"]) == helps
        keep_U = kept_from_text(commit.cut.kept, 48)
        assert commit.cut.removed == 3 * 32 * int((~keep_U).sum())
        for maker in ("gate_proj", "up_proj"):
            assert not left.pop(f"model.layers.{index}.mlp.{maker}.bias").any()
            name = f"model.layers.{index}.mlp.{maker}.weight"
            assert same_bits(left.pop(name), dense[name][keep_U])
        down = f"model.layers.{index}.mlp.down_proj.weight"
        assert same_bits(left.pop(down), dense[down][:, keep_U].contiguous())
    assert any(commit.tuned for commit in commits.values())
    assert all(same_bits(tensor, dense[name]) for name, tensor in left.items())
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["mlp_bias"] is True
    verified = verify(tmp_path, source, SILENT)
    assert verified.identical_tensors == len(left)
    assert verified.parameters == sum(tensor.numel() for tensor in tensors_in(tmp_path / "model").values())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [FLAP, THEN_BESA], ids=str)
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    recipe: RecipeEntries, compute: str, source: Path, tmp_path: Path
) -> None:
    check_stopped(settings(source, tmp_path / "run", recipe, compute={"dtype": compute}))


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    check_killed(settings(source, tmp_path / "run", FLAP))


def test_how_memory_is_used_changes_no_byte(source: Path, tmp_path: Path) -> None:
    check_memory(settings(source, tmp_path / "run", FLAP))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (BIAS, lambda t: t.fill_(float("nan")), r"down_proj\.bias holds NaN or Inf"),
        ("model.layers.{}.mlp.gate_proj.bias", lambda t: t.fill_(1), r"gate_proj\.bias was only to lose neurons, but"),
        ("model.layers.{}.mlp.up_proj.bias", lambda t: t[1:].contiguous(), r"up_proj\.bias is .*, what is left of its"),
    ],
)
def test_a_model_of_other_biases_does_not_verify(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, FLAP))
    index = next(i for i, commit in Ledger.read(tmp_path).commits.items() if commit.tuned)
    exchange(tmp_path / "model", name.format(index), change)
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path, source, SILENT)


def test_a_family_without_room_for_biases_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("mistral", tmp_path / "source")
    with pytest.raises(ConfigError, match=r"flap with `recovery: bias` gives .* transformers' mistral has no"):
        carry_out(settings(tmp_path / "source", tmp_path / "run", FLAP))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_the_plan_counts_the_biases_and_refuses_families_without(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", FLAP)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run_command(["run", config], monkeypatch) == 0
    left = tensors_in(tmp_path / "run" / "model")
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in left.values())
    gone = sum(t.numel() for t in tensors_in(source).values()) - sum(t.numel() for t in left.values())
    assert plan["part_gone"] == pytest.approx(gone / (3 * 7744))
    save_tiny("mistral", tmp_path / "mistral")
    config.write_text(json.dumps(settings(tmp_path / "mistral", tmp_path / "other", FLAP)))
    capsys.readouterr()
    assert run_command(["plan", config], monkeypatch) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "only granite and llama have" in said
