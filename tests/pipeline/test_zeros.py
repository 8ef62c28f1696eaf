"""Tensors of zeros beside those of a checkpoint, and which models get them."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig

from pipeline.anatomy import MLPS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.structured.narrowing import Comp, Narrowing
from pipeline.methods.structured.published import Flap
from pipeline.methods.structured.shape_step import ShortGpt
from pipeline.narrower import narrowed
from pipeline.shape import Shape
from pipeline.shards import PIECE_BYTES, TensorEntry
from pipeline.skeleton import Skeleton
from pipeline.zeros import TAKE_MLP_BIASES, WithZeros, adds_biases
from tests.tiny import FAMILIES, GROUPED, save_tiny

BIASED = Shape(kept=(0, 2), width=40, mlp_bias=True)
OLD, NEW = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"


def dense_of(directory: Path, family: str = "llama") -> Skeleton:
    save_tiny(family, directory, torch.bfloat16)
    return Skeleton(Checkpoint.open(directory), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    """A llama of three blocks without biases."""
    skeleton = dense_of(tmp_path_factory.mktemp("zeros"))
    with closing(skeleton.checkpoint):
        yield skeleton


def test_a_model_with_zero_biases_is_the_same_model_with_room_for_others(dense: Skeleton) -> None:
    left = narrowed(dense, BIASED)
    view = left.checkpoint
    assert view.settings()["mlp_bias"] is True
    assert left.blocks[1].get_parameter("mlp.up_proj.bias").shape == (48,)
    assert view.tensors[NEW].shape == (48,)
    assert view.read(NEW).dtype == view.tensors[NEW].dtype == torch.bfloat16
    assert not view.read(NEW).any()
    assert b"".join(view.chunks(NEW)) == bytes(view.tensors[NEW].num_bytes) == bytes(96)
    assert torch.equal(view.read(OLD), dense.checkpoint.read(OLD.replace(".1.", ".2.")))
    added = len(view.tensors) - len(narrowed(dense, Shape(kept=(0, 2), width=40)).checkpoint.tensors)
    assert added == 2 * 3
    block = left.load_block(1, view)
    assert not block.get_parameter("mlp.down_proj.bias").any()
    assert torch.equal(block.get_parameter("mlp.up_proj.weight"), view.read(OLD).float())


def test_what_lies_in_no_file_is_not_read_from_one(dense: Skeleton) -> None:
    entry = TensorEntry(name=NEW, dtype=torch.float32, shape=(5_000_000,), start=0, num_bytes=20_000_000)
    view = WithZeros(dense.checkpoint, {NEW: entry})
    view.will_need([OLD, NEW])
    assert [len(piece) for piece in view.chunks(NEW)] == [PIECE_BYTES, 20_000_000 - PIECE_BYTES]
    target = torch.ones(5)
    view.read_into(NEW, target)
    assert not target.any()
    assert b"".join(view.chunks(OLD)) == b"".join(dense.checkpoint.chunks(OLD))
    assert view.locate(OLD) == dense.checkpoint.locate(OLD)
    assert view.fingerprint() == dense.checkpoint.fingerprint()
    with pytest.raises(CheckpointError, match=rf"has no tensor '{NEW}' among its"):
        view.locate(NEW)


@pytest.mark.parametrize(
    ("step", "width", "adds"),
    [
        (Flap(), 40, True),
        (Comp(recovery="bias"), 40, True),
        (Flap(), None, False),
        (Flap(recovery="none"), 40, False),
        (Comp(), 40, False),
        (ShortGpt(), None, False),
    ],
    ids=str,
)
def test_biases_come_where_a_recovery_needs_them(
    step: Narrowing, width: int | None, adds: bool, dense: Skeleton
) -> None:
    assert adds_biases(step, dense, width) == adds


def test_biases_that_are_there_already_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "biased", LlamaConfig(**GROUPED, mlp_bias=True))
    assert not adds_biases(Flap(), dense_of(tmp_path, "biased"), 40)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gemma2"])
def test_families_without_room_for_biases_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"transformers' {family} has no place .* only granite and llama have\. Set"):
        adds_biases(Flap(), dense_of(tmp_path, family), 40)


@pytest.mark.parametrize("family", sorted(MLPS))
def test_the_families_that_take_biases_are_those_of_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GraniteConfig(**GROUPED) if family == "granite" else LlamaConfig(**GROUPED)
    config = next((known for known in FAMILIES.values() if known.model_type == family), config)
    written = {**config.to_dict(), "mlp_bias": True}
    monkeypatch.setitem(FAMILIES, "biased", type(config).from_dict(written))
    has = "mlp.down_proj.bias" in dense_of(tmp_path, "biased").block_names(0)
    assert has == (config.model_type in TAKE_MLP_BIASES)
