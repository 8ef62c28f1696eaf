"""Runs that silence attentions: which ones, what the model then computes, and what is said of its size."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pipeline.anatomy import kept_from_text
from pipeline.calibration import load_calibration
from pipeline.config import parse_config
from pipeline.errors import RunStopped, VerificationError
from pipeline.ledger import Ledger
from pipeline.verify import verify
from tests.integration.endings import check_killed, check_memory, check_stopped
from tests.integration.narrow import exchange, settings
from tests.integration.smaller import NUM_BLOCKS
from tests.integration.smaller import six_blocks as six_blocks
from tests.integration.support import (
    SILENT,
    RecipeEntries,
    asked_otherwise,
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
from tests.tiny import FAMILIES, GROUPED, save_tiny, some_tokens

TWO_SSP: RecipeEntries = ["two_ssp"]
THEN_WANDA: RecipeEntries = [{"two_ssp": {"ratio": 0.5, "multiple": 8}}, "wanda"]
THEN_BESA: RecipeEntries = [
    {"two_ssp": {"ratio": 0.4, "recovery": "mask"}},
    {"besa": {"target": "dense"}},
    "sparsegpt",
    {"reconstruct": {"epochs": 1, "norms": True}},
]


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama-biased", LlamaConfig(**GROUPED, mlp_bias=True, attention_bias=True))
        yield


def silence(model: PreTrainedModel, blocks: list[int]) -> None:
    """Have the attention of some blocks add nothing, whatever its weights are."""
    for block in blocks:
        attention = model.model.layers[block].self_attn.o_proj  # what comes after may be a norm, of zeros then
        attention.register_forward_hook(lambda module, args, output: torch.zeros_like(output))


def calibration_tokens(source: Path) -> torch.Tensor:
    config = parse_config(settings(source, source.parent / "nowhere", TWO_SSP), "the test")
    return load_calibration(config.calibration, source, load(source).config.vocab_size).tokens_NT


def chosen(run_directory: Path) -> list[int]:
    provenance = json.loads((run_directory / "model/pruning.json").read_text())
    silent: list[int] = provenance["blocks"]["attentions_silenced"]
    return silent


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen2", "gemma2", "phi3"])
def test_the_output_loads_anywhere_and_is_the_dense_model_without_these_attentions(family: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny(family, tmp_path / "source", torch.bfloat16)
    report = carry_out(job(tmp_path / "source", tmp_path / "run", TWO_SSP, 0.4))
    tokens, model = some_tokens(2, 20), tmp_path / "run" / "model"
    loaded = loaded_whole(model)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    silence(dense, chosen(tmp_path / "run"))
    for index, commit in Ledger.read(tmp_path / "run").commits.items():
        assert commit.cut is not None
        gone = ~kept_from_text(commit.cut.kept, commit.cut.num_neurons)
        dense.model.layers[index].mlp.down_proj.weight.data[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
        loaded.generate(tokens[:, :6], max_new_tokens=12, do_sample=False)
    assert report.perplexity_after == pytest.approx(perplexity_of(loaded, evaluation_windows(tmp_path / "source")))
    verify(tmp_path / "run", tmp_path / "source", SILENT)


def test_attentions_go_one_by_one_as_the_dense_models_own_perplexity_says(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, TWO_SSP, 0.4))
    order, tokens = chosen(tmp_path), calibration_tokens(source)
    measured = json.loads((tmp_path / "shape.json").read_text())["measured"]
    assert len(order) == 2
    assert len(measured) == NUM_BLOCKS + NUM_BLOCKS - 1
    gone: list[int] = []
    for block in order:
        by_hand = {}
        for candidate in set(range(NUM_BLOCKS)) - set(gone):
            model = load(source).float()
            silence(model, [*gone, candidate])
            by_hand[candidate] = perplexity_of(model, tokens)
            name = f"attentions {' '.join(map(str, sorted([*gone, candidate])))}"
            assert measured[name] == [pytest.approx(by_hand[candidate], rel=1e-5)]
        assert block == min(by_hand, key=lambda candidate: by_hand[candidate])
        gone.append(block)


def test_neurons_go_by_their_mean_norm_behind_what_is_silent_before_them(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, TWO_SSP, 0.4))
    model, inputs = load(source).float(), []
    silence(model, chosen(tmp_path))
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    with torch.no_grad():
        model(calibration_tokens(source))
    commit = Ledger.read(tmp_path).commits[0]
    assert commit.cut is not None
    score_U = torch.stack([x_TU.norm(dim=0) for x_TU in inputs[0]]).mean(dim=0)
    wanted = score_U.argsort()[-commit.cut.width :].sort().values
    assert kept_from_text(commit.cut.kept, commit.cut.num_neurons).nonzero()[:, 0].tolist() == wanted.tolist()


def test_what_is_silent_is_counted_as_idle_and_not_as_gone(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, TWO_SSP, 0.4))
    silent, dense, left = chosen(tmp_path), tensors_in(source), tensors_in(tmp_path / "model")
    blocks = json.loads((tmp_path / "model/pruning.json").read_text())["blocks"]
    numel = sum(t.numel() for name, t in dense.items() if any(f"layers.{b}.self_attn." in name for b in silent))
    assert blocks["parameters_idle"] == numel > 0
    assert report.smaller is not None
    gone = sum(t.numel() for t in dense.values()) - report.smaller.parameters
    inside = sum(t.numel() for name, t in dense.items() if ".layers." in name)
    assert 0.4 <= (gone + numel) / inside < 0.43
    assert gone / inside < 0.4
    really, idle = report.as_json()["guidance"]
    assert really.startswith("The model is really smaller: 6 of 6 blocks are left, with ")
    assert f"of 2 of 6 blocks ({', '.join(map(str, silent))}) is silenced: its output projection is zero." in idle
    assert f"its {numel:,} parameters count as idle, not as gone" in idle
    writers = {f"model.layers.{block}.self_attn.o_proj.weight" for block in silent}
    assert all(not left[name].any() and left[name].shape == dense[name].shape for name in writers)
    others = {name for name in left if ".mlp." not in name} - writers
    assert all(same_bits(left[name], dense[name]) for name in others)
    verified = verify(tmp_path, source, SILENT)
    assert verified.identical_tensors == len(others)


def test_a_model_that_only_has_silent_attentions_is_not_called_smaller(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, [{"two_ssp": {"alpha": 100.0}}], 0.1))
    assert len(chosen(tmp_path)) == NUM_BLOCKS
    assert [said[:18] for said in report.as_json()["guidance"]] == ["The attention of 6"]
    assert all(commit.cut is None for commit in Ledger.read(tmp_path).commits.values())
    verify(tmp_path, source, SILENT)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [TWO_SSP, THEN_WANDA, THEN_BESA], ids=str)
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    recipe: RecipeEntries, compute: str, source: Path, tmp_path: Path
) -> None:
    check_stopped(settings(source, tmp_path / "run", recipe, 0.4, compute={"dtype": compute}), blocks=(1, 2, 5))


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    check_killed(settings(source, tmp_path / "run", TWO_SSP, 0.4), deadly=(4, 11, 23, 40))


def test_a_search_that_was_stopped_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    own, asked = settings(source, tmp_path, TWO_SSP, 0.4), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 13  # blocks 0 to 5, block 0 once more, and blocks 1 to 5 have run by then

    with pytest.raises(RunStopped, match=r"while the attentions to silence were chosen; .*Go on with: secateur run .*"):
        carry_out(own, stop=stop)
    measured = json.loads((tmp_path / "shape.json").read_text())["measured"]
    assert list(measured) == ["attentions 0", "attentions 1"]
    carry_out(own)
    assert json.loads((tmp_path / "shape.json").read_text())["measured"].items() >= measured.items()


def test_how_memory_is_used_changes_no_byte(source: Path, tmp_path: Path) -> None:
    check_memory(settings(source, tmp_path / "run", TWO_SSP, 0.4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill_(0, torch.tensor([3]), 1.0), r"o_proj\.weight was not pruned, but differs from its"),
        (lambda t: t[:-1].contiguous(), r"o_proj\.weight is torch\.bfloat16 \(31, 32\), its source"),
    ],
)
def test_a_model_whose_attention_is_not_silent_does_not_verify(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, TWO_SSP, 0.2))
    (block,) = chosen(tmp_path)
    exchange(tmp_path / "model", f"model.layers.{block}.self_attn.o_proj.weight", change)
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path, source, SILENT)


def test_another_number_of_attentions_than_was_asked_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, TWO_SSP, 0.2))
    asked_otherwise(tmp_path, tmp_path / "again", lambda prune: prune.update(sparsity=0.4))
    with pytest.raises(VerificationError, match=r"1 attentions are silenced, and 2 were to be"):
        verify(tmp_path / "again", source, SILENT)


def test_the_plan_counts_the_search_and_what_will_be_idle(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", TWO_SSP, 0.4)))
    assert run_command(["plan", config, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run_command(["plan", config], monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"parameters go, {plan['part_idle']:.2%} become idle with silenced attentions" in said
    # In two rounds of 6 and 5 candidates half of 7 blocks are run for each, and 5 for all of a round.
    search = next(phase for phase in plan["phases"] if phase["name"] == "choose")
    assert search["bytes_read"] == 48 * plan["block_weights"] * 2
    assert run_command(["run", config], monkeypatch) == 0
    assert "is silenced: its output projection is zero" in " ".join(capsys.readouterr().err.split())
    left, dense = tensors_in(tmp_path / "run" / "model"), tensors_in(source)
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in left.values())
    inside = sum(t.numel() for name, t in dense.items() if ".layers." in name)
    gone = sum(t.numel() for t in dense.values()) - sum(t.numel() for t in left.values())
    assert plan["part_gone"] == pytest.approx(gone / inside)
    blocks = json.loads((tmp_path / "run/model/pruning.json").read_text())["blocks"]
    assert plan["part_idle"] == pytest.approx(blocks["parameters_idle"] / inside)
