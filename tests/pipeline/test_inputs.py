"""What a stage starts from: dense blocks run in place or in passing, with all their weights held or read in rounds."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline import inputs
from pipeline.activations import Boundary, in_memory
from pipeline.budget import Budget
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NumericsError
from pipeline.inputs import can_hold, embed_tokens, pass_dense_stream, run_dense_blocks
from pipeline.memory import Memory, unlimited
from pipeline.skeleton import Skeleton
from pipeline.stream_names import StreamName
from tests.stores import disk, everything
from tests.tiny import save_tiny, some_tokens

CPU = torch.device("cpu")
TOKENS_NT = some_tokens(5, 12)
BATCH = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "model"
    save_tiny("gemma2", path)
    return path


@pytest.fixture
def skeleton(directory: Path) -> Iterator[Skeleton]:
    with closing(Checkpoint.open(directory)) as checkpoint:
        yield Skeleton(checkpoint, CPU, torch.float32)


class Kept:
    """An outlet that keeps what it is sent."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary, self.order = boundary, list[slice]()

    def send(self, stream: StreamName, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        assert stream == "dense"
        self.boundary.write(sequences, hidden_BTD, "the test")
        self.order.append(sequences)


@pytest.mark.parametrize("holds_all", [True, False])
def test_what_passes_through_is_what_running_the_blocks_makes(
    skeleton: Skeleton, holds_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "can_hold", lambda *_: holds_all)
    boundary = embed_tokens(skeleton, TOKENS_NT, BATCH, in_memory(), "pruned")
    before, kept = everything(boundary), Kept(in_memory().copy("kept", boundary))
    pass_dense_stream(skeleton, boundary, range(1, 3), BATCH, kept, unlimited())
    assert torch.equal(everything(boundary), before), "the stage's own input stays"
    assert kept.order == [slice(0, 2), slice(2, 4), slice(4, 5)]
    run_dense_blocks(skeleton, boundary, range(1, 3), BATCH, unlimited())
    assert torch.equal(everything(kept.boundary), everything(boundary))
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters())


def test_rounds_read_the_weights_anew_and_holding_them_reads_once(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    load = skeleton.load_block
    monkeypatch.setattr(skeleton, "load_block", lambda index, source: loaded.append(index) or load(index, source))
    boundary = embed_tokens(skeleton, TOKENS_NT, 1, in_memory(), "pruned")
    for holds_all in (True, False):
        monkeypatch.setattr(inputs, "can_hold", lambda *_, answer=holds_all: answer)
        kept = Kept(in_memory().copy("kept", boundary))
        pass_dense_stream(skeleton, boundary, range(2), 1, kept, unlimited())
    assert loaded == [0, 1] + [0, 1] * 3  # five sequences make three rounds of two


def test_whether_weights_are_held_depends_on_the_memory_there_is(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = skeleton.block_names(0).values()
    needed = sum(skeleton.checkpoint.tensors[name].num_bytes for name in names)
    monkeypatch.setattr(inputs, "free_bytes", lambda device: 8 * needed)
    assert can_hold(skeleton, range(1), Budget())
    assert not can_hold(skeleton, range(2), Budget())


def test_a_ceiling_is_kept_while_the_dense_stream_passes(skeleton: Skeleton) -> None:
    boundary = embed_tokens(skeleton, TOKENS_NT, 1, in_memory(), "pruned")
    kept = Kept(in_memory().copy("kept", boundary))
    block, sequence = 4 * skeleton.block_numel(0), everything(boundary)[0].nbytes
    budget = Budget({"host": block + 2 * sequence}, unified=True)
    assert not can_hold(skeleton, range(3), budget), "three blocks are more than the ceiling"
    memory = Memory(budget=budget, store=in_memory())
    pass_dense_stream(skeleton, boundary, range(3), 1, kept, memory)
    run_dense_blocks(skeleton, boundary, range(3), 1, unlimited())
    assert torch.equal(everything(kept.boundary), everything(boundary))
    assert block < budget.peak("host") <= block + 2 * sequence
    assert budget.held("host") == 0


def test_what_will_be_needed_is_read_ahead_where_it_lies(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[bytes] = []

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        advised.append(os.pread(descriptor, count, start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    names = list(skeleton.block_names(1).values())
    skeleton.checkpoint.will_need(names)
    assert advised == [skeleton.checkpoint.read(name).numpy().tobytes() for name in names]


def test_an_embedding_that_is_not_finite_leaves_nothing_in_the_spool(
    skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.activations.all_finite", lambda hidden_BTD: False)
    with disk(tmp_path, "threads") as place:
        with pytest.raises(NumericsError, match="hidden states after the embedding hold NaN"):
            embed_tokens(skeleton, TOKENS_NT, BATCH, place.store(BATCH), "pruned")
        assert not place.files()
        assert place.budget.held("host") == place.budget.held("spool") == 0
