"""Checkpoints that cannot be pruned: each is refused with the fact and the way out, and nothing is left half done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.integration.support import INDEX, job, refusal, run_command, write_text
from tests.tiny import save_mixtral, save_tiny

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sound")
    save_tiny("llama", base / "source")
    return base / "source"


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A sound checkpoint of the test's own, to be damaged."""
    write_text(tmp_path)
    shutil.copytree(sound, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def refuse(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[dict[str, Any]], str]:
    """Run the command on the source with some sections of the configuration; return the error it ends with."""

    def run_and_refuse(sections: dict[str, Any]) -> str:
        config = source.parent / "job.yaml"
        config.write_text(yaml.safe_dump(job(source, source.parent / "run", evaluate=None) | sections))
        return refusal(config, source, monkeypatch, capsys)

    return run_and_refuse


def shard_of(directory: Path, name: str) -> Path:
    file: str = json.loads((directory / INDEX).read_text())["weight_map"][name]
    return directory / file


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configured(**changes: Any) -> Damage:
    return lambda directory: edit_json(directory / "config.json", lambda config: config.update(changes))


def indexed(change: Callable[[dict[str, str]], Any]) -> Damage:
    return lambda directory: edit_json(directory / INDEX, lambda index: change(index["weight_map"]))


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(directory: Path) -> None:
        path = shard_of(directory, name)
        tensors = load_file(path)
        save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})

    return damage


def with_one(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = number
        return tensor

    return change


def with_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(directory: Path) -> None:
        path = shard_of(directory, UP)
        path.write_bytes(change(path.read_bytes()))

    return damage


def overlapping(content: bytes) -> bytes:
    """Let the last tensor of a shard begin four bytes early."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((fields for name, fields in header.items() if name != "__metadata__"), key=lambda f: f["data_offsets"])
    last["data_offsets"] = [offset - 4 for offset in last["data_offsets"]]
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length : -4]


def only_pickled(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def mixture_of_experts(directory: Path) -> None:
    shutil.rmtree(directory)
    save_mixtral(directory)


def without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def of_custom_code(directory: Path) -> None:
    """A model type of its own, whose code would leave a mark."""
    configured(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})(directory)
    mark = directory / "mark"
    (directory / "mine.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Mine: pass\n")


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no directory": (shutil.rmtree, "source is no directory", "give the one that holds the model"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json", "not a whole model directory"),
    "a shard missing": (
        lambda d: shard_of(d, UP).unlink(),
        "lacks 1 of the 7 shards its index names (model-0000",
        "finish the download",
    ),
    "a shard cut short": (with_bytes(lambda b: b[:-100]), "it is cut short", "Fetch or write it again"),
    "a header longer than the file": (
        with_bytes(lambda b: (10**6).to_bytes(8, "little") + b[8:]),
        "announces a header of 1,000,000 bytes, and ",
        "Fetch or write it again",
    ),
    "a header beyond all bounds": (
        with_bytes(lambda b: b"\xff" * 8 + b[8:]),
        "at most 100,000,000 may be",
        "Fetch or write it again",
    ),
    "overlapping tensors": (
        with_bytes(overlapping),
        "overlaps the one before it by 4 bytes",
        "Fetch or write it again",
    ),
    "an index that leaves the directory": (
        indexed(lambda names: names.update({UP: "../elsewhere.safetensors"})),
        f"puts tensor '{UP}' in '../elsewhere.safetensors', which could lie outside the model directory",
        "only plain names of files beside the index are followed",
    ),
    "an index with a tensor too few": (
        indexed(lambda names: names.pop(UP)),
        f"lacks 1 tensors that llama needs, such as {UP}",
        "the download is incomplete, or the config.json is of another model",
    ),
    "an index with a tensor too many": (
        indexed(lambda names: names.update({"more": names[UP]})),
        "tensors in the shards where its index puts them (more)",
        "index and shards must be of one model",
    ),
    "an index that is no JSON": (lambda d: (d / INDEX).write_text("{"), f"{INDEX} is not JSON", "fetch it again"),
    "shards without an index": (lambda d: (d / INDEX).unlink(), "has 7 safetensors files", "fetch the index"),
    "pickled weights": (only_pickled, "only pickled weights (pytorch_model.bin)", "safe_serialization=True"),
    "an unknown model type": (configured(model_type="nonesuch"), "does not know the model", "use a model type that"),
    "code of its own": (of_custom_code, "does not know the model", "Custom code is never run"),
    "a config.json that is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "does not know the model",
        "use a model type that",
    ),
    "an encoder-decoder": (configured(model_type="t5"), "(t5) is not a causal language model", "CausalLM"),
    "a quantised model": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised (config.json has quantization_config)",
        "use the checkpoint it was quantised from",
    ),
    "integer weights": (
        with_tensor(UP, lambda t: t.to(torch.int8)),
        f"{UP} is stored as torch.int8",
        "use the checkpoint it was quantised from",
    ),
    "weights of another shape": (
        configured(intermediate_size=40),
        "has shape (48, 32) on disk, but config.json makes it (40, 32)",
        "",
    ),
    "mixture of experts": (
        mixture_of_experts,
        "only blocks made of matrices can be pruned so far, not fused experts",
        "Choose a dense model",
    ),
    "NaN in a weight": (
        with_tensor(UP, with_one(torch.nan)),
        f"{UP} holds 1 NaN or Inf of 1536 numbers",
        "check the download",
    ),
    "Inf in a weight": (
        with_tensor(UP, with_one(-torch.inf)),
        f"{UP} holds 1 NaN or Inf of 1536 numbers",
        "check the download",
    ),
    "NaN in the embedding": (
        with_tensor("model.embed_tokens.weight", with_one(torch.nan)),
        "model.embed_tokens.weight holds 1 NaN or Inf of 3072 numbers",
        "check the download",
    ),
    "no tokenizer": (
        without_tokenizer,
        "no tokenizer can be loaded from",
        "or use a source of ready tokens: {tokens: FILE}",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_unsuitable_source_is_refused_with_the_fact_and_the_way_out(
    name: str, source: Path, refuse: Callable[[dict[str, Any]], str]
) -> None:
    damage, fact, way_out = DAMAGES[name]
    damage(source)
    message = refuse({})
    assert fact in message
    assert way_out in message
    assert not (source / "mark").exists()


def test_weights_too_large_for_the_compute_dtype_are_named(
    source: Path, refuse: Callable[[dict[str, Any]], str]
) -> None:
    with_tensor(UP, with_one(1e6))(source)
    message = refuse({"compute": {"dtype": "float16"}})
    assert f"{UP} holds 1 NaN or Inf of 1536 numbers once read as torch.float16" in message
    assert "or compute in float32" in message


OVERFLOWING = {
    "between linears": "model.layers.1.mlp.up_proj.weight",  # the input of down_proj is not finite
    "at the block's end": "model.layers.1.mlp.down_proj.weight",  # no linear sees it: only the output is not finite
}


@pytest.mark.parametrize("recipe", [["magnitude"], ["wanda"], ["sparsegpt"], ["besa"], [{"besa": {"target": "dense"}}]])
@pytest.mark.parametrize("where", OVERFLOWING)
def test_hidden_states_that_overflow_stop_the_block_by_name(
    where: str, recipe: list[Any], source: Path, refuse: Callable[[dict[str, Any]], str]
) -> None:
    with_tensor(OVERFLOWING[where], lambda t: t.sign() * 6e4)(source)
    with_tensor("model.layers.1.post_attention_layernorm.weight", lambda t: t.sign() * 100)(source)
    message = refuse({"compute": {"dtype": "float16"}, "prune": {"recipe": recipe}})
    assert "block 1" in message
    assert "NaN or Inf" in message or "not finite" in message
    assert "compute.dtype: float32" in message


def test_an_evaluation_that_overflows_says_so(source: Path, refuse: Callable[[dict[str, Any]], str]) -> None:
    with_tensor("lm_head.weight", lambda t: t.sign() * 6e4)(source)
    text = {"text": str(source.parent / "text.txt"), "sequence_length": 20, "windows": 2}
    message = refuse({"compute": {"dtype": "float16"}, "evaluate": text})
    assert "NaN or Inf" in message or "not finite" in message
    assert "float32" in message


def test_a_model_too_bad_for_a_float_has_an_infinite_perplexity(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_tensor("lm_head.weight", lambda t: t * 1e5)(source)
    text = source.parent / "text.txt"
    status = run_command(["evaluate", source, "--text", text, "--sequence-length", "20", "--windows", "2"], monkeypatch)
    assert status in {0, 1}  # a figure or a reason, but no traceback
    assert "perplexity" in capsys.readouterr().err
