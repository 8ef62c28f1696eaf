"""A checkpoint without some blocks: the same bytes by other names, and models of which that cannot be had."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, PretrainedConfig

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, UnsupportedCheckpoint
from pipeline.narrower import narrowed
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from tests.tiny import FAMILIES, GROUPED, SHAPE, SPECIAL, VOCAB, save_tiny

KEPT = Shape(kept=(0, 3, 5))


def dense_of(directory: Path, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> Skeleton:
    monkeypatch.setitem(FAMILIES, "six", config)
    save_tiny("six", directory, torch.bfloat16)
    return Skeleton(Checkpoint.open(directory), torch.device("cpu"), torch.float32)


def gpt2(**options: object) -> GPT2Config:
    return GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=6, n_head=4, n_positions=64, **SPECIAL, **options)


def test_a_view_reads_the_sources_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of(tmp_path, gpt2(), monkeypatch)
    with closing(narrowed(dense, KEPT).checkpoint) as view:
        ours, theirs = "transformer.h.2.attn.c_attn.weight", "transformer.h.5.attn.c_attn.weight"
        assert view.tensors[ours].name == ours
        assert torch.equal(view.read(ours), dense.checkpoint.read(theirs))
        target = torch.empty(view.tensors[ours].shape)
        view.read_into(ours, target)
        assert torch.equal(target, dense.checkpoint.read(theirs).float())
        assert b"".join(view.chunks(ours)) == b"".join(dense.checkpoint.chunks(theirs))
        assert view.locate(ours) == dense.checkpoint.locate(theirs)
        view.will_need([ours])
        assert view.fingerprint() == dense.checkpoint.fingerprint()
        assert view.directory == dense.checkpoint.directory
        assert json.loads(view.config_bytes()) == view.settings()
        for gone in (theirs, "transformer.h.3.ln_1.weight"):
            with pytest.raises(CheckpointError, match=rf"has no tensor '{gone}'"):
                view.read(gone)


def test_blocks_keep_the_kind_of_attention_they_have_in_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Gemma2Config(**{**GROUPED, "num_hidden_layers": 6}, head_dim=8, sliding_window=8)  # they alternate
    dense = dense_of(tmp_path, config, monkeypatch)
    left = narrowed(dense, KEPT)
    windows = [block.self_attn.sliding_window for block in left.blocks]
    assert windows == [dense.blocks[block].self_attn.sliding_window for block in KEPT.kept] == [8, None, None]
    assert [block.self_attn.layer_idx for block in left.blocks] == [0, 1, 2]


def test_old_buffers_within_blocks_stay_behind_and_those_outside_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = dense_of(tmp_path, gpt2(), monkeypatch).checkpoint
    shard = tmp_path / next(iter(checkpoint.shard_of.values()))
    index = tmp_path / "model.safetensors.index.json"
    old = {"transformer.h.5.attn.old": torch.ones(2), "transformer.old": torch.ones(2)}
    save_file(load_file(shard) | old, shard, {"format": "pt"})
    found = json.loads(index.read_text())
    found["weight_map"] |= dict.fromkeys(old, shard.name)
    index.write_text(json.dumps(found))
    dense = Skeleton(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float32)
    assert old.keys() <= set(dense.outside_names())
    assert [name for name in narrowed(dense, KEPT).checkpoint.tensors if name.endswith("old")] == ["transformer.old"]


def test_blocks_that_count_from_the_bottom_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of(tmp_path, gpt2(scale_attn_by_inverse_layer_idx=True), monkeypatch)
    narrowed(dense, Shape(kept=(0, 1, 2)))  # these have their numbers still
    with pytest.raises(UnsupportedCheckpoint, match=r"block 3 would be another block .* its attn\.scaling would"):
        narrowed(dense, KEPT)


def test_blocks_of_different_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of(tmp_path, GPTNeoXConfig(**{**SHAPE, "num_hidden_layers": 6}), monkeypatch)
    monkeypatch.setattr(dense, "block_numel", lambda block: 10 + block)
    with pytest.raises(UnsupportedCheckpoint, match=r"gpt_neox has blocks of 10 to 15 parameters; whole blocks can be"):
        narrowed(dense, KEPT)


def test_blocks_with_other_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of(tmp_path, gpt2(), monkeypatch)
    names = dense.block_names

    def of_two_kinds(block: int) -> dict[str, str]:
        return {own.replace("mlp", "moe") if block == 3 else own: stored for own, stored in names(block).items()}

    monkeypatch.setattr(dense, "block_names", of_two_kinds)
    with pytest.raises(UnsupportedCheckpoint, match=r"block 3 would be another .*: block 1 has other tensors"):
        narrowed(dense, KEPT)


def test_a_config_that_says_the_number_of_blocks_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_of(tmp_path, gpt2(), monkeypatch)
    monkeypatch.setattr("pipeline.narrower.edited_settings", lambda config, written, shape: dict(written))
    with pytest.raises(UnsupportedCheckpoint, match=r"takes its number of blocks from elsewhere than"):
        narrowed(dense, KEPT)
