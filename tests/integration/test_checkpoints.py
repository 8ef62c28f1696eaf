"""What a checkpoint may look like: half precision, tied or untied heads, unknown tensors, one file or many."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.progress import Silent
from pipeline.verify import verify
from tests.integration.support import (
    INDEX,
    by_rows,
    carry_out,
    digests,
    evaluation_windows,
    job,
    load,
    matrices,
    perplexity_of,
    same_bits,
    tensors_in,
    write_text,
)
from tests.tiny import save_tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def add_tensor(directory: Path, name: str, tensor: torch.Tensor) -> None:
    """Put one more tensor into the last shard, and into the index."""
    index = json.loads((directory / INDEX).read_text())
    shard = max(index["weight_map"].values())
    save_file({**load_file(directory / shard), name: tensor}, directory / shard, metadata={"format": "pt"})
    index["weight_map"][name] = shard
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["wanda", "besa", "magnitude"])
def test_half_precision_weights_that_are_kept_stay_as_they_were_to_the_bit(
    method: str, dtype: torch.dtype, base: Path
) -> None:
    save_tiny("llama", base / "source", dtype)
    carry_out(job(base / "source", base / "run", [method], compute={"dtype": "float32"}))
    source, output = tensors_in(base / "source"), tensors_in(base / "run" / "model")
    for name, weight in output.items():
        assert weight.dtype == dtype
        pruned = weight.ne(0) if name in matrices(load(base / "source")) else torch.ones_like(weight, dtype=torch.bool)
        assert same_bits(weight[pruned], source[name][pruned]), name


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", [["wanda"], ["besa", "sparsegpt"]])
def test_float32_weights_pruned_in_half_precision_are_stored_in_float32(
    recipe: list[str], compute: str, base: Path
) -> None:
    save_tiny("llama", base / "source")
    carry_out(job(base / "source", base / "run", recipe, compute={"dtype": compute}))
    source, output = tensors_in(base / "source"), tensors_in(base / "run" / "model")
    assert {tensor.dtype for tensor in output.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    kept = output[name] != 0
    assert same_bits(output[name][kept], source[name][kept]) == (recipe == ["wanda"])


def test_skipped_linears_stay_dense(base: Path) -> None:
    save_tiny("llama", base / "source")
    skip = ["mlp.down_proj", "self_attn.*"]
    report = carry_out(job(base / "source", base / "run", prune={"recipe": ["wanda"], "skip": skip}))
    source, output = tensors_in(base / "source"), tensors_in(base / "run" / "model")
    for name in matrices(load(base / "source")):
        assert same_bits(output[name], source[name]) == ("down_proj" in name or "self_attn" in name), name
    assert report.prunable_weights == 3 * 2 * 48 * 32
    assert verify(base / "run", base / "source", Silent()).pruned_tensors == 6


def test_besa_spends_its_budget_on_what_is_not_skipped(base: Path) -> None:
    save_tiny("llama", base / "source")
    prune = {"recipe": ["besa"], "sparsity": 0.3, "skip": ["mlp.*"]}
    carry_out(job(base / "source", base / "run", prune=prune))
    weights = by_rows(load(base / "source"), tensors_in(base / "run" / "model"))
    zeros = sum(int((w == 0).sum()) for name, w in weights.items() if "layers.1." in name)
    assert zeros == int(0.3 * (2 * 32 * 32 + 2 * 16 * 32))


def test_a_head_of_its_own_counts_though_the_configuration_says_tied(base: Path) -> None:
    save_tiny("llama-tied", base / "source")
    head = torch.randn(96, 32)
    add_tensor(base / "source", "lm_head.weight", head)
    report = carry_out(job(base / "source", base / "run"))
    output = tensors_in(base / "run" / "model")
    assert same_bits(output["lm_head.weight"], head)
    assert same_bits(output["model.embed_tokens.weight"], tensors_in(base / "source")["model.embed_tokens.weight"])
    windows = evaluation_windows(base / "source")
    assert report.perplexity_before == pytest.approx(perplexity_of(load(base / "source"), windows), rel=1e-6)
    assert report.perplexity_after == pytest.approx(perplexity_of(load(base / "run" / "model"), windows), rel=1e-6)


def test_tensors_that_transformers_does_not_know_are_copied_through(base: Path) -> None:
    save_tiny("llama", base / "source")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "mtp.head.weight": torch.rand(7, 5).bfloat16(),
        "step": torch.tensor(12, dtype=torch.int64),
        "nothing": torch.empty(0, 3),
    }
    for name, tensor in extra.items():
        add_tensor(base / "source", name, tensor)
    carry_out(job(base / "source", base / "run"))
    output = tensors_in(base / "run" / "model")
    for name, tensor in extra.items():
        assert same_bits(output[name], tensor), name
    verify(base / "run", base / "source", Silent())


def test_checkpoint_names_without_the_models_prefix_keep_their_names(base: Path) -> None:
    """gpt2 on the hub calls its tensors h.0…, transformers transformer.h.0…"""
    model = save_tiny("gpt2", base / "source", shard="1GB")
    path = base / "source" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    report = carry_out(job(base / "source", base / "run"))
    output, source = tensors_in(base / "run" / "model"), load_file(path)
    assert output.keys() == source.keys()
    assert "h.0.attn.c_attn.weight" in output
    pruned = {name for name in output if not same_bits(output[name], source[name])}
    assert pruned == {name.removeprefix("transformer.") for name in matrices(model)}
    windows = evaluation_windows(base / "source")
    assert report.perplexity_before == pytest.approx(perplexity_of(model, windows), rel=1e-6)
    assert report.perplexity_after == pytest.approx(perplexity_of(load(base / "run" / "model"), windows), rel=1e-6)


def test_a_directory_of_links_as_the_hubs_cache_has_it_is_read_through(base: Path) -> None:
    save_tiny("llama", base / "blobs")
    (base / "source").mkdir()
    for path in (base / "blobs").iterdir():
        (base / "source" / path.name).symlink_to(path)
    carry_out(job(base / "source", base / "run"))
    verify(base / "run", base / "blobs", Silent())
    written = list((base / "run" / "model").iterdir())
    assert {"config.json", "tokenizer.json"} < {path.name for path in written}
    assert [path.name for path in written if path.is_symlink()] == []


def test_the_shards_of_the_source_do_not_matter(base: Path) -> None:
    for shard in ("3kB", "20kB", "1GB"):
        save_tiny("qwen2", base / shard, shard=shard)
        carry_out(job(base / shard, base / f"{shard}-run"))
    outputs = [tensors_in(base / f"{shard}-run" / "model") for shard in ("3kB", "20kB", "1GB")]
    assert outputs[0].keys() == outputs[1].keys() == outputs[2].keys()
    assert all(same_bits(t, other[name]) for other in outputs[1:] for name, t in outputs[0].items())
    files = {path.name for path in (base / "1GB-run" / "model").glob("*.safetensors")}
    assert files == {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)}


class Watching(Silent):
    """Records which tasks begin, and whether the model looked loadable while blocks were pruned."""

    def __init__(self, model: Path) -> None:
        self.model, self.seen_index = model, False
        self.tasks: list[tuple[str, int]] = []

    def begin(self, task: str, total: int, done: int) -> None:
        self.tasks.append((task, done))

    def phase(self, block: int, name: str) -> None:
        self.seen_index |= "after" not in self.tasks[-1][0] and (self.model / INDEX).exists()


def test_there_is_no_index_before_the_last_block_is_done(base: Path) -> None:
    save_tiny("llama", base / "source")
    progress = Watching(base / "run" / "model")
    carry_out(job(base / "source", base / "run"), progress)
    assert progress.tasks == [("evaluate before", 0), ("prune", 0), ("evaluate after", 0)]
    assert not progress.seen_index
    assert (base / "run" / "model" / INDEX).exists()


def test_a_finished_run_started_again_does_no_work_and_changes_no_byte(base: Path) -> None:
    save_tiny("llama", base / "source")
    settings = job(base / "source", base / "run", [{"besa": {"target": "dense"}}])
    first = carry_out(settings)
    kept, shards = digests(base / "run"), sorted((base / "run" / "model").glob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in shards]
    progress = Watching(base / "run" / "model")
    again = carry_out(settings, progress)
    assert progress.tasks == []
    assert [path.stat().st_mtime_ns for path in shards] == written
    changed = {name for name, digest in digests(base / "run").items() if kept[name] != digest}
    assert changed <= {"lock", "report/report.json"}  # who holds it, and peak memory
    assert again.pruned_weights == first.pruned_weights
    assert (again.seconds, again.perplexity_after) == (first.seconds, first.perplexity_after)
