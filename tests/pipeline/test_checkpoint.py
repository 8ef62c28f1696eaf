"""A model directory as named tensors: what is found, what is refused and in which words."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from pipeline import shards
from pipeline.checkpoint import INDEX_NAME, MAX_OPEN_SHARDS, Checkpoint, write_index
from pipeline.errors import CheckpointError, MalformedShard, UnsupportedCheckpoint

Shards = dict[str, dict[str, torch.Tensor]]

NUM_SHARDS = MAX_OPEN_SHARDS + 2
MANY: Shards = {f"{shard}.safetensors": {f"w{shard}": torch.full((50,), shard)} for shard in range(NUM_SHARDS)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with a config and no weights yet."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def save(directory: Path, content: Shards, index: object = None) -> None:
    """Write each shard, and `index` as the weight map (by default, the true one)."""
    for file, tensors in content.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in content.items() for name in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map if index is None else index}))


def refused(directory: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        Checkpoint.open(directory)


def test_shards_saved_by_hugging_face_are_one_set_of_names(model: Path) -> None:
    state = {f"layer.{number}": torch.randn(8, 8) for number in (10, 9, 1, 0)}
    save_torch_state_dict(state, model, max_shard_size=600)
    checkpoint = Checkpoint.open(model)
    assert len(set(checkpoint.shard_of.values())) == 2
    assert checkpoint.tensors.keys() == checkpoint.shard_of.keys() == state.keys()
    assert checkpoint.total_bytes() == 4 * 8 * 8 * 4
    for name, tensor in state.items():
        target = torch.empty(8, 8, dtype=torch.bfloat16)
        checkpoint.read_into(name, target)
        assert torch.equal(target, tensor.bfloat16())
        assert torch.equal(checkpoint.read(name), tensor)
        assert b"".join(map(bytes, checkpoint.chunks(name))) == tensor.numpy().tobytes()


def test_names_come_by_shard_then_in_the_order_of_the_file(model: Path) -> None:
    pair = {"y": torch.zeros(1), "z": torch.zeros(2)}
    save(model, {"b.safetensors": {"first": torch.zeros(1)}, "a.safetensors": pair})
    order = list(shards.read_header(model / "a.safetensors"))
    assert list(Checkpoint.open(model).tensors) == [*order, "first"]


@pytest.mark.parametrize("file", ["model.safetensors", "other.safetensors"])
def test_a_single_file_needs_no_index(file: str, model: Path) -> None:
    save_file({"w": torch.arange(3)}, model / file)
    checkpoint = Checkpoint.open(model)
    assert checkpoint.shard_of == {"w": file}
    assert torch.equal(checkpoint.read("w"), torch.arange(3))


def test_the_single_file_counts_before_the_index_as_in_transformers(model: Path) -> None:
    save(model, {"other.safetensors": {"w": torch.zeros(1)}})
    save_file({"w": torch.ones(1)}, model / "model.safetensors")
    assert Checkpoint.open(model).shard_of == {"w": "model.safetensors"}


def test_tensors_the_index_does_not_name_are_not_the_model_s(model: Path) -> None:
    one, two = {"w": torch.ones(1), "extra": torch.ones(9)}, {"v": torch.ones(1), "extra": torch.ones(9)}
    index = {"w": "a.safetensors", "v": "b.safetensors"}
    save(model, {"a.safetensors": one, "b.safetensors": two}, index)
    checkpoint = Checkpoint.open(model)
    assert list(checkpoint.tensors) == ["w", "v"]
    assert checkpoint.total_bytes() == 8


def test_a_hub_cache_whose_files_are_links_is_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "config.json").write_text("{}")
    save(blobs, {"a.safetensors": {"w": torch.ones(2)}})
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    checkpoint = Checkpoint.open(snapshot)
    assert torch.equal(checkpoint.read("w"), torch.ones(2))
    assert [path.name for path in checkpoint.side_files()] == ["config.json"]


def test_a_directory_that_holds_no_model_is_refused_for_what_it_lacks(tmp_path: Path) -> None:
    refused(tmp_path / "none", "/none is no directory: give the one that holds the model")
    refused(tmp_path, "has no config.json, so it is not a whole model directory")
    (tmp_path / "config.json").touch()
    refused(tmp_path, r"has no \*.safetensors file: the model's weights must lie in it")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_out(file: str, model: Path) -> None:
    (model / file).write_bytes(b"pickle")
    message = rf"only pickled weights \({file}\).* machine you trust .*safe_serialization=True\)"
    refused(model, message, UnsupportedCheckpoint)


def test_pickled_weights_beside_safetensors_do_not_matter(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    save_file({"w": torch.ones(1)}, model / "model.safetensors")
    assert list(Checkpoint.open(model).tensors) == ["w"]


def test_several_files_without_an_index_cannot_be_put_together(model: Path) -> None:
    for file in "abcd":
        save_file({file: torch.ones(1)}, model / f"{file}.safetensors")
    refused(model, r"has 4 safetensors files \(a.safetensors, b.safetensors, c.safetensors, ...\) and no mod")


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "a/../x", "."])
def test_an_index_that_could_lead_outside_is_refused(file: str, model: Path) -> None:
    save(model, {}, index={"w": file})
    refused(model, f"puts tensor 'w' in '{file}', which could lie outside the model directory: only plain")


@pytest.mark.parametrize("file", ["..", "", "a\0b"])
def test_an_index_of_names_that_are_no_files_lacks_shards(file: str, model: Path) -> None:
    save(model, {}, index={"w": file})
    refused(model, "lacks 1 of the 1 shards its index names")


def test_missing_shards_are_counted_and_named(model: Path) -> None:
    save(model, MANY)
    (model / "1.safetensors").unlink()
    (model / "4.safetensors").unlink()
    (model / "4.safetensors").symlink_to(model / "gone")
    refused(model, rf"lacks 2 of the {NUM_SHARDS} shards .*\(1.safetensors, 4.safetensors\): finish the down")


def test_a_tensor_its_shard_lacks_is_named(model: Path) -> None:
    save(model, MANY, index={"w0": "0.safetensors", "w1": "0.safetensors", "w2": "2.safetensors"})
    refused(model, r"lacks 1 of 3 tensors in the shards where its index puts them \(w1\): index and shards")


def test_a_tensor_in_two_shards_is_named(model: Path) -> None:
    one, two = {"u": torch.ones(1), "w": torch.ones(1)}, {"v": torch.ones(1), "w": torch.ones(1)}
    save(model, {"a.safetensors": one, "b.safetensors": two})
    refused(model, "has tensor 'w' twice, in b.safetensors and in a.safetensors: which one counts cannot be")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000])
def test_an_index_that_is_not_json_is_refused(content: bytes, model: Path) -> None:
    (model / INDEX_NAME).write_bytes(content)
    refused(model, f"{INDEX_NAME} is not JSON .*: fetch it again")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"w": 1}}])
def test_an_index_without_a_weight_map_is_refused(index: object, model: Path) -> None:
    (model / INDEX_NAME).write_text(json.dumps(index))
    refused(model, f"{INDEX_NAME} has no weight_map of tensor names to file names: fetch it again")


def test_a_malformed_shard_is_named_when_the_checkpoint_is_opened(model: Path) -> None:
    save(model, MANY)
    os.truncate(model / "2.safetensors", 100)
    refused(model, "2.safetensors is not a sound safetensors file: .* cut short", MalformedShard)


@pytest.mark.parametrize("method", ["read", "chunks"])
def test_an_unknown_name_is_answered_with_the_nearest(method: str, model: Path) -> None:
    save_file({"model.norm.weight": torch.ones(1), "b": torch.ones(1)}, model / "model.safetensors")
    checkpoint = Checkpoint.open(model)
    read = {"read": checkpoint.read, "chunks": lambda name: list(checkpoint.chunks(name))}[method]
    with pytest.raises(CheckpointError, match=r"no tensor 'norm.weight' among its 2; .* 'model.norm.weight'"):
        read("norm.weight")
    with pytest.raises(CheckpointError, match=r"no tensor '\?' among its 2$"):
        read("?")


def test_only_a_few_shards_are_open_at_a_time(model: Path) -> None:
    save(model, MANY)
    checkpoint = Checkpoint.open(model)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(NUM_SHARDS):
            assert torch.equal(checkpoint.read(f"w{shard}"), MANY[f"{shard}.safetensors"][f"w{shard}"])
    assert len(os.listdir("/proc/self/fd")) == before + MAX_OPEN_SHARDS
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert checkpoint.read("w0")[0] == 0


def test_the_shard_used_last_stays_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model, MANY)
    checkpoint, opened, os_open = Checkpoint.open(model), [], os.open

    def observed(path: Path, flags: int) -> int:
        opened.append(path.stem)
        return os_open(path, flags)

    monkeypatch.setattr(os, "open", observed)
    for shard in (0, 1, 2, 3, 0, 4, 0, 1):
        checkpoint.read(f"w{shard}")
    assert opened == ["0", "1", "2", "3", "4", "1"]


def test_threads_may_read_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model, MANY)
    checkpoint, turns, preadv = Checkpoint.open(model), [turn % NUM_SHARDS for turn in range(100)], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (time.sleep(0.001), preadv(*args))[1])
    with ThreadPoolExecutor(2 * MAX_OPEN_SHARDS) as pool:
        tensors = list(pool.map(lambda shard: checkpoint.read(f"w{shard}"), turns))
    assert [tensor.unique().tolist() for tensor in tensors] == [[shard] for shard in turns]


def test_chunks_go_on_while_other_shards_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 64)
    save(model, MANY)
    checkpoint, joined = Checkpoint.open(model), b""
    for chunk in checkpoint.chunks("w1"):
        joined += chunk
        for shard in range(NUM_SHARDS):
            checkpoint.read(f"w{shard}")
    assert joined == MANY["1.safetensors"]["w1"].numpy().tobytes()


def test_a_shard_replaced_by_another_is_noticed(model: Path) -> None:
    save(model, MANY)
    checkpoint = Checkpoint.open(model)
    save_file({"w0": torch.ones(51)}, model / "0.safetensors")
    with pytest.raises(CheckpointError, match=r"0.safetensors has been replaced since the checkpoint was op"):
        checkpoint.read("w0")


def test_the_fingerprint_is_of_headers_and_config_alone(model: Path) -> None:
    save(model, MANY)
    before = Checkpoint.open(model).fingerprint()
    save_file({"w0": torch.full((50,), 7)}, model / "0.safetensors")
    (model / "README.md").touch()
    assert Checkpoint.open(model).fingerprint() == before
    (model / "config.json").write_text("{ }")
    assert Checkpoint.open(model).fingerprint() != before


@pytest.mark.parametrize(
    ("file", "name", "tensor"),
    [
        ("b.safetensors", "w", torch.zeros(4)),
        ("a.safetensors", "v", torch.zeros(4)),
        ("a.safetensors", "w", torch.zeros(2, 2)),
        ("a.safetensors", "w", torch.zeros(4, dtype=torch.int32)),
    ],
)
def test_the_fingerprint_changes_with_a_shard(file: str, name: str, tensor: torch.Tensor, model: Path) -> None:
    save_file({"w": torch.zeros(4)}, model / "a.safetensors")
    before = Checkpoint.open(model).fingerprint()
    (model / "a.safetensors").unlink()
    save_file({name: tensor}, model / file)
    assert Checkpoint.open(model).fingerprint() != before


NEEDED = """
LICENSE LICENSE.txt added_tokens.json chat_template.jinja chat_template.json config.json generation_config.json
merges.txt preprocessor_config.json qwen.tiktoken special_tokens_map.json spiece.model tekken.json
tokenizer.json tokenizer.model tokenizer_config.json vocab.json vocab.txt
"""
LEFT = """
README.md .gitattributes .env modeling_x.py tokenizer.py tokenizer.pkl tokenizer.bin vocab.index.json
model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json a.pt a.pth a.ckpt a.gguf
tf_model.h5 flax_model.msgpack vocab.onnx trainer_state.json training_args.bin
"""


def test_side_files_are_all_a_tokenizer_needs_and_never_weights_or_code(model: Path) -> None:
    save_file({"w": torch.ones(1)}, model / "model.safetensors")
    for name in (NEEDED + LEFT).split():
        (model / name).write_text("{}")
    (model / "tokenizer_files").mkdir()
    (model / "additional_chat_templates" / "deep").mkdir(parents=True)
    for name in ("rag.jinja", "rag.py", "deep/x.jinja"):
        (model / "additional_chat_templates" / name).touch()
    found = [str(path.relative_to(model)) for path in Checkpoint.open(model).side_files()]
    assert found == sorted([*NEEDED.split(), "additional_chat_templates/rag.jinja"])


def test_a_written_index_opens_and_is_as_hugging_face_writes_it(model: Path) -> None:
    save_torch_state_dict({"b": torch.randn(8, 8), "a": torch.randn(8, 8)}, model, max_shard_size=300)
    theirs = json.loads((model / INDEX_NAME).read_text())
    write_index(model, theirs["weight_map"], total_size=512)
    assert json.loads((model / INDEX_NAME).read_text()) == theirs
    assert Checkpoint.open(model).shard_of == theirs["weight_map"]
