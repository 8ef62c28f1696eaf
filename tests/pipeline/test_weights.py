"""Blocks that come through a pager are the blocks that the checkpoint reads, bit for bit, and are read ahead."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import weights as weights_module
from pipeline.budget import Budget
from pipeline.checkpoint import Checkpoint
from pipeline.errors import BudgetExceeded, CheckpointError, NumericsError
from pipeline.header import TensorEntry
from pipeline.paging.engines import open_pager
from pipeline.paging.pager import ALIGNMENT, Pager
from pipeline.skeleton import Skeleton
from pipeline.weights import PIECE_BYTES, BlockWeights, pieces_of
from tests.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(params=["threads", "aio"])
def pager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pager]:
    if request.param == "aio":
        from pipeline.paging import aio

        if not (aio.is_installed() and aio.is_built()):
            pytest.skip("DeepSpeed's asynchronous I/O is not built here: secateur doctor --build")
    with closing(open_pager(request.param, tmp_path)) as opened:
        yield opened


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


def shard_of(source: Path, name: str) -> Path:
    with closing(Checkpoint.open(source)) as checkpoint:
        return source / checkpoint.shard_of[name]


def parameters(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in skeleton.blocks[index].named_parameters()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_what_the_checkpoint_reads(
    source: Path, pager: Pager, stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "PIECE_BYTES", ALIGNMENT)
    for shard in source.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(shard).items()}, shard)
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU, dtype)
        with BlockWeights(skeleton, Budget(), pager) as weights:
            for index in range(skeleton.num_blocks):
                if index + 1 < skeleton.num_blocks:
                    weights.expect(index + 1)
                weights.load(index)
                came = parameters(skeleton, index)
                skeleton.load_block(index, checkpoint)
                expected = parameters(skeleton, index)
                assert came.keys() == expected.keys()
                assert all(torch.equal(came[name], expected[name]) for name in expected)
                assert {tensor.dtype for tensor in came.values()} == {dtype}
                weights.drop(index)
                assert all(p.is_meta for p in skeleton.blocks[index].parameters())


def test_what_is_held_is_in_the_budget_and_given_back(source: Path, pager: Pager) -> None:
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton, budget = Skeleton(checkpoint, CPU, torch.float32), Budget(unified=True)
        block_bytes = sum(p.nbytes for p in skeleton.blocks[0].parameters())
        with BlockWeights(skeleton, budget, pager) as weights:
            weights.load(0)
            buffers = budget.held("host") - block_bytes
            assert buffers == weights_module.NUM_PIECES * PIECE_BYTES
            weights.expect(1)
            assert budget.held("host") == 2 * block_bytes + buffers
            weights.load(1)
            weights.drop(0)
            assert budget.held("host") == block_bytes + buffers
            assert weights.bytes_read == 2 * block_bytes
            weights.drop(1)
        assert budget.held("host") == 0


def test_a_block_for_which_there_is_no_room_is_refused_before_it_is_read(source: Path, pager: Pager) -> None:
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU, torch.float32)
        with (
            BlockWeights(skeleton, Budget({"host": 1000}), pager) as weights,
            pytest.raises(BudgetExceeded, match=r"the weights of block 2, read ahead needs [\d,]+ bytes"),
        ):
            weights.expect(2)


def test_numbers_that_are_not_finite_are_refused_with_their_name(source: Path, pager: Pager) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = shard_of(source, name)
    tensors = load_file(shard)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard)
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU, torch.float32)
        with BlockWeights(skeleton, Budget(), pager) as weights, pytest.raises(NumericsError, match=name):
            weights.load(1)


@pytest.mark.parametrize("damage", ["replaced", "cut"])
def test_a_source_that_changes_under_a_run_is_refused(source: Path, pager: Pager, damage: str) -> None:
    shard = shard_of(source, "model.layers.1.mlp.up_proj.weight")
    with closing(Checkpoint.open(source)) as checkpoint:
        skeleton, budget = Skeleton(checkpoint, CPU, torch.float32), Budget()
        with BlockWeights(skeleton, budget, pager) as weights:
            checkpoint.read("model.layers.1.mlp.up_proj.weight")
            if damage == "replaced":
                save_file(load_file(shard), source / "other")
                (source / "other").replace(shard)
            else:
                os.truncate(shard, ALIGNMENT)
            weights.expect(1)
            with pytest.raises(CheckpointError, match=shard.name):
                weights.load(1)
        assert budget.held("host") == budget.held("device") == 0


@pytest.mark.parametrize("start", [8, ALIGNMENT - 2, 3 * ALIGNMENT + 130])
@pytest.mark.parametrize("num_bytes", [2, ALIGNMENT, PIECE_BYTES - 130, 2 * PIECE_BYTES + 6])
def test_pieces_cover_a_tensor_once_at_aligned_offsets(start: int, num_bytes: int) -> None:
    entry = TensorEntry(name="w", dtype=torch.bfloat16, shape=(num_bytes // 2,), start=start, num_bytes=num_bytes)
    pieces = list(pieces_of("w", entry))
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == num_bytes
    for piece in pieces:
        assert piece.offset % ALIGNMENT == piece.num_bytes % ALIGNMENT == 0
        assert 0 < piece.num_bytes <= PIECE_BYTES
        assert piece.offset + piece.skip == start + piece.begin
        assert piece.skip + piece.end - piece.begin <= piece.num_bytes
