"""Runs that take heads out of every attention: the model is really smaller, does what it should, and loads anywhere."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.anatomy import kept_from_text, mlp_of
from pipeline.attention import attention_of
from pipeline.errors import ConfigError, VerificationError
from pipeline.ledger import Ledger
from pipeline.records import CutRecord, HeadsRecord
from pipeline.uneven import load
from pipeline.verify import verify
from tests.heads import FITTING, families_with_heads
from tests.integration.headless import GROUPS, QUERIES, THEN_WANDA
from tests.integration.narrow import exchange, settings
from tests.integration.streamed import streamed_logits
from tests.integration.support import (
    SILENT,
    RecipeEntries,
    asked_otherwise,
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
from tests.tiny import save_tiny, some_tokens


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Iterator[None]:
    with families_with_heads():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, more_families: None) -> Path:
    base = tmp_path_factory.mktemp("heads")
    write_text(base)
    save_tiny("h-llama-wide", base / "source", torch.bfloat16)
    return base / "source"


def cuts_of(run_directory: Path) -> Iterator[tuple[int, CutRecord, HeadsRecord]]:
    for index, commit in Ledger.read(run_directory).commits.items():
        assert commit.cut is not None
        assert commit.cut.heads is not None
        yield index, commit.cut, commit.cut.heads


def zeroed_logits(source: Path, run_directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the dense model, with what reads its heads and neurons as the run has left it, zero where they are gone."""
    written, config = tensors_in(run_directory / "model"), AutoConfig.from_pretrained(source)
    attention, mlp = attention_of(config), mlp_of(config)
    cuts = {index: (cut, heads) for index, cut, heads in cuts_of(run_directory)}

    def alter(index: int, block: nn.Module, names: Mapping[str, str]) -> None:
        cut, heads = cuts[index]
        kept = attention.layout.kept(kept_from_text(heads.kept, heads.num_units), heads.unit)
        for reader, keep_D in (
            (attention.reader, kept.query_features), (mlp.reader, kept_from_text(cut.kept, cut.num_neurons))
        ):  # fmt: skip
            weight_OD = block.get_parameter(f"{reader}.weight").data
            weight_OD.zero_()
            weight_OD[:, keep_D] = written[names[f"{reader}.weight"]].float()

    return streamed_logits(source, tokens, alter)


CASES = [
    *((family, GROUPS) for family in (*FITTING, "h-llama-wide", "h-llama-wide-rope")),
    *((family, QUERIES) for family in ("h-llama-wide", "h-mistral", "h-qwen2", "h-qwen3", "h-phi3")),
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_the_output_loads_anywhere_and_is_the_dense_model_without_these_heads(
    family: str, recipe: RecipeEntries, tmp_path: Path
) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    report = carry_out(job(tmp_path / "source", tmp_path / "run", recipe, 0.35))
    tokens, model = some_tokens(2, 20), tmp_path / "run" / "model"
    loaded = loaded_whole(model)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens).logits, zeroed_logits(tmp_path / "source", tmp_path / "run", tokens), rtol=1e-4, atol=1e-4
        )
        loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
    attention = loaded.model.layers[0].self_attn
    assert attention.o_proj.in_features == loaded.config.num_attention_heads * loaded.config.head_dim
    assert report.perplexity_after == pytest.approx(perplexity_of(loaded, evaluation_windows(tmp_path / "source")))
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_a_llama_whose_heads_no_longer_divide_its_hidden_size_is_written_as_a_mistral(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carry_out(settings(source, tmp_path, GROUPS, 0.35))
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (6, 3, 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.sliding_window is None
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("a few words").input_ids
    assert tokens == AutoTokenizer.from_pretrained(source)("a few words").input_ids
    assert not caplog.records


def test_what_goes_is_what_was_asked_counted_from_the_files(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, GROUPS, 0.35))
    dense, left = tensors_in(source), tensors_in(tmp_path / "model")
    inside = [sum(t.numel() for name, t in tensors.items() if ".layers." in name) for tensors in (dense, left)]
    assert 0.35 <= 1 - inside[1] / inside[0] < 0.36
    removed = sum(cut.removed for _, cut, _ in cuts_of(tmp_path))
    assert removed == inside[0] - inside[1]
    provenance = json.loads((tmp_path / "model/pruning.json").read_text())
    assert report.smaller is not None
    assert provenance["parameters"] == report.smaller.parameters == sum(t.numel() for t in left.values())
    assert provenance["heads"]["unit"] == "group"
    assert [int(kept, 16).bit_count() for kept in provenance["heads"]["kept"]] == [3] * 3
    assert provenance["blocks"]["heads"] == {"num_heads": 6, "num_groups": 3, "head_dim": 8}
    assert "neurons and 6 query heads on 3 of keys and values each." in report.as_json()["guidance"][0]
    assert {"0.heads", "0.neurons"} <= report.linears.keys()
    verified = verify(tmp_path, source, SILENT)
    assert verified.identical_tensors == len(left) - 7 * 3


def test_only_heads_and_neurons_change_where_nothing_makes_up_for_them(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, [{"wanda_sp": {"heads": 0.25}}], 0.35))
    dense, left = tensors_in(source), tensors_in(tmp_path / "model")
    for index, _, heads in cuts_of(tmp_path):
        keep_G = kept_from_text(heads.kept, heads.num_units)
        groups, queries = keep_G.repeat_interleave(8), keep_G.repeat_interleave(16)
        prefix = f"model.layers.{index}.self_attn"
        for name, features in (("q", queries), ("k", groups), ("v", groups)):
            weight = f"{prefix}.{name}_proj.weight"
            assert same_bits(left[weight], dense[weight][features])
        out = f"{prefix}.o_proj.weight"
        assert same_bits(left[out], dense[out][:, queries].contiguous())


def test_a_recovery_is_taken_only_where_it_errs_less(source: Path, tmp_path: Path) -> None:
    for recovery in ("mask", "lstsq"):
        recipe: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "heads": 0.25, "recovery": recovery}}]
        carry_out(settings(source, tmp_path / recovery, recipe, 0.35))
        found = [record for _, cut, heads in cuts_of(tmp_path / recovery) for record in (cut, heads)]
        for record in found:
            assert record.rewritten == (record.notes["recovered"] == 1.0)
            assert (record.notes["error_after"] < record.notes["error_before"]) == record.rewritten
        assert any(heads.rewritten for _, _, heads in cuts_of(tmp_path / recovery))
        verify(tmp_path / recovery, source, SILENT)


def test_what_is_left_is_masked_and_no_less(source: Path, tmp_path: Path) -> None:
    for within_block in ("joint", "sequential"):
        prune = {"recipe": THEN_WANDA, "sparsity": "2:4", "within_block": within_block}
        report = carry_out(settings(source, tmp_path / within_block, THEN_WANDA, prune=prune))
        matrices = [t for name, t in tensors_in(tmp_path / within_block / "model").items() if "proj" in name]
        assert report.achieved == 0.5
        assert report.prunable_weights == sum(tensor.numel() for tensor in matrices)
        assert all(2 * int((tensor == 0).sum()) == tensor.numel() for tensor in matrices)
        verify(tmp_path / within_block, source, SILENT)


def test_neurons_see_the_attention_that_is_left_only_where_statistics_are_gathered_anew(
    source: Path, tmp_path: Path
) -> None:
    scores: dict[str, list[str]] = {}
    for within_block in ("joint", "sequential"):
        prune = {"recipe": GROUPS, "sparsity": 0.35, "within_block": within_block}
        carry_out(settings(source, tmp_path / within_block, GROUPS, prune=prune))
        first = next(cuts_of(tmp_path / within_block))
        scores[within_block] = [first[2].kept, str(first[2].notes["kappa_max"]), str(first[1].notes["kappa_max"])]
        verify(tmp_path / within_block, source, SILENT)
    assert scores["joint"][:2] == scores["sequential"][:2]
    assert scores["joint"][2] != scores["sequential"][2]


def test_blocks_of_different_widths_have_as_many_heads_each(source: Path, tmp_path: Path) -> None:
    recipe: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "heads": 0.25, "widths": "per_block", "spread": 0.6}}]
    carry_out(settings(source, tmp_path, recipe, 0.35))
    widths = [cut.width for _, cut, _ in cuts_of(tmp_path)]
    assert len(set(widths)) > 1
    tokens, loaded = some_tokens(2, 20), load(tmp_path / "model", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, zeroed_logits(source, tmp_path, tokens), rtol=1e-4, atol=1e-4)
        loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
    verify(tmp_path, source, SILENT)


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_splits_are_tried_with_the_heads_gone(within_block: str, source: Path, tmp_path: Path) -> None:
    recipe: RecipeEntries = [{"comp": {"depth_fraction": "auto", "heads": 0.25}}]
    prune = {"recipe": recipe, "sparsity": 0.45, "within_block": within_block}
    report = carry_out(settings(source, tmp_path, recipe, prune=prune))
    assert report.smaller is not None
    tried = report.smaller.blocks["tried"]
    assert isinstance(tried, dict)
    assert isinstance(tried["perplexity"], dict)
    assert set(tried["perplexity"]) == {"0", "1"}
    verify(tmp_path, source, SILENT)


def test_what_is_masked_of_blocks_with_fewer_heads_may_be_spread_by_outliers(source: Path, tmp_path: Path) -> None:
    recipe: RecipeEntries = [THEN_WANDA[0], "magnitude"]
    prune = {"recipe": recipe, "sparsity": 0.5, "allocation": {"owl": {"spread": 0.1}}}
    report = carry_out(settings(source, tmp_path, recipe, prune=prune))
    assert len(set(report.block_sparsity)) > 1
    assert report.achieved == pytest.approx(0.5, abs=1e-3)
    verify(tmp_path, source, SILENT)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_proj", lambda t: t.flip(0), r"q_proj\.weight was only to lose heads, but what is left of it"),
        ("o_proj", lambda t: t.fill_(float("nan")), r"o_proj\.weight holds NaN or Inf"),
        ("v_proj", lambda t: t[:-1].contiguous(), r"v_proj\.weight is .*, what is left of its source .*\(24, 64\)"),
    ],
)
def test_a_model_of_other_heads_does_not_verify(
    name: str, change: Any, message: str, source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, GROUPS, 0.35))
    exchange(tmp_path / "model", f"model.layers.1.self_attn.{name}.weight", change)
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path, source, SILENT)


def test_a_run_of_other_heads_than_were_asked_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, GROUPS, 0.35))
    asked_otherwise(tmp_path, tmp_path / "again", lambda prune: prune["recipe"][0]["comp"].update(heads=0.0))
    message = r"block 0 keeps 6 query heads on 3 of keys and values, and all were to stay"
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path / "again", source, SILENT)


@pytest.mark.parametrize(
    ("family", "prune", "message"),
    [
        ("h-olmo2", {"recipe": GROUPS}, r"no heads can be removed from the attention of olmo2 so far"),
        ("h-gemma2-wide", {"recipe": GROUPS}, r"gemma2 with 6 query heads would not load .*0\.5 \(4 left\)"),
        ("h-llama-wide", {"recipe": [{"comp": {"heads": 0.2}}]}, r"heads: 0\.2 of 4 groups of heads is less than one"),
        ("h-llama-wide", {"recipe": GROUPS, "sparsity": 0.1}, r"leaves nothing for neurons to give"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(
    family: str, prune: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        carry_out(settings(tmp_path / "source", tmp_path / "run", [], prune={"sparsity": 0.35, **prune}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_what_becomes_smaller_cannot_be_skipped(source: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "skip": ["*.v_proj"]}
    with pytest.raises(ConfigError, match=r"skip leaves \*\.v_proj dense, but removing heads makes .*o_proj smaller"):
        carry_out(settings(source, tmp_path, [], prune=prune))


def test_the_command_plans_runs_and_verifies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", GROUPS, 0.35)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["heads"] == {"num_heads": 6, "num_groups": 3, "head_dim": 8}
    assert run_command(["plan", config], monkeypatch) == 0
    assert "neurons and 6 query heads on 3 of keys and values; 35." in " ".join(capsys.readouterr().err.split())
    assert run_command(["run", config], monkeypatch) == 0
    assert "are left in every block, and 6 query heads" in " ".join(capsys.readouterr().err.split())
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in tensors_in(tmp_path / "run" / "model").values())
    assert run_command(["verify", tmp_path / "run", "--source", source], monkeypatch) == 0
