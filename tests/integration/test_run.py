"""Whole runs on tiny models of every family: the output loads, generates, and is its source but for the zeros."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.progress import Silent
from pipeline.report import Report
from pipeline.verify import verify
from tests.integration.support import (
    by_rows,
    carry_out,
    evaluation_windows,
    job,
    load,
    matrices,
    perplexity_of,
    same_bits,
    tensors_in,
    write_text,
)
from tests.tiny import FAMILIES, save_tiny, some_tokens

RATIO = 0.55
"""Of 32, 48 or 128 columns this is no whole number: counts must round down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A finished run."""

    family: str
    source: Path
    directory: Path
    report: Report

    @property
    def model(self) -> Path:
        return self.directory / "model"


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    base = tmp_path_factory.mktemp(request.param)
    write_text(base)
    save_tiny(request.param, base / "source")
    report = carry_out(job(base / "source", base / "run", sparsity=RATIO))
    return Pruned(family=request.param, source=base / "source", directory=base / "run", report=report)


def test_the_output_loads_with_transformers_and_generates(pruned: Pruned) -> None:
    model = load(pruned.model)
    prompt = some_tokens(1, 5)
    generated = model.generate(prompt, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(generated[:, :5], prompt)
    assert 6 <= generated.shape[1] <= 8
    assert AutoTokenizer.from_pretrained(pruned.model)("pruned")["input_ids"]


def test_every_row_loses_exactly_its_share_and_keeps_the_rest_to_the_bit(pruned: Pruned) -> None:
    model, sources = load(pruned.source), tensors_in(pruned.source)
    source, output = by_rows(model, sources), by_rows(model, tensors_in(pruned.model))
    for name, weight in output.items():
        kept = weight != 0
        assert ((~kept).sum(dim=1) == int(RATIO * weight.shape[1])).all(), name
        assert same_bits(weight[kept], source[name][kept]), name


def test_everything_but_the_blocks_matrices_is_copied_to_the_bit(pruned: Pruned) -> None:
    source, output = tensors_in(pruned.source), tensors_in(pruned.model)
    assert output.keys() == source.keys()
    untouched = source.keys() - matrices(load(pruned.source)).keys()
    assert untouched
    assert [name for name in untouched if not same_bits(output[name], source[name])] == []


def test_the_output_computes_what_its_source_computes_under_the_masks(pruned: Pruned) -> None:
    expected, tokens = load(pruned.source), some_tokens(2, 24)
    weights = tensors_in(pruned.model)
    for name in matrices(expected):
        parameter = expected.get_parameter(name)
        parameter.data *= weights[name] != 0
    with torch.no_grad():
        assert torch.equal(load(pruned.model)(tokens).logits, expected(tokens).logits)


def test_the_streamed_perplexities_are_those_of_transformers(pruned: Pruned) -> None:
    windows = evaluation_windows(pruned.source)
    before, after = perplexity_of(load(pruned.source), windows), perplexity_of(load(pruned.model), windows)
    assert before != pytest.approx(after, rel=5e-5)
    assert pruned.report.perplexity_before == pytest.approx(before, rel=1e-6)
    assert pruned.report.perplexity_after == pytest.approx(after, rel=1e-6)


def test_verify_finds_what_was_done(pruned: Pruned) -> None:
    found, model = verify(pruned.directory, pruned.source, Silent()), load(pruned.source)
    weights = by_rows(model, tensors_in(pruned.model))
    assert found.pruned_tensors == len(weights)
    assert found.identical_tensors == found.tensors - len(weights)
    assert found.pruned_weights == pruned.report.pruned_weights == sum(int((w == 0).sum()) for w in weights.values())
    assert found.prunable_weights == pruned.report.prunable_weights == sum(w.numel() for w in weights.values())


def test_the_output_directory_is_complete(pruned: Pruned) -> None:
    side_files = [path for path in pruned.source.iterdir() if "safetensors" not in path.name]
    assert {path.name for path in side_files} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    for path in side_files:
        assert (pruned.model / path.name).read_bytes() == path.read_bytes(), path.name
    index = json.loads((pruned.model / "model.safetensors.index.json").read_text())
    tensors = tensors_in(pruned.model)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
    made = json.loads((pruned.model / "pruning.json").read_text())
    assert made["settings"]["prune"] == {
        "sparsity": RATIO, "recipe": [{"wanda": {}}], "within_block": "joint", "skip": [],
    }  # fmt: skip
    assert made["pruned_weights"] == pruned.report.pruned_weights


def test_a_tied_head_is_not_written(pruned: Pruned) -> None:
    tied = load(pruned.source).config.tie_word_embeddings
    assert tied == (pruned.family in {"llama-tied", "gpt2", "gemma2", "gemma3", "opt"})
    heads = {"lm_head.weight", "embed_out.weight"}
    assert heads.isdisjoint(tensors_in(pruned.model)) == tied
