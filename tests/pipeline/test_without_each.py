"""Models without each of their blocks: the figures of whole passes, to the bit, for about half the work."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import RunStopped
from pipeline.evaluate import evaluate
from pipeline.memory import Memory, unlimited
from pipeline.methods.structured.shape_step import Sleb
from pipeline.narrower import narrowed
from pipeline.planning.choosing import choosing_of
from pipeline.progress import Silent
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from pipeline.without_each import evaluate_without_each
from tests.stores import disk
from tests.tiny import FAMILIES, save_tiny, some_tokens

NUM_BLOCKS = 5
TOKENS_NT = some_tokens(5, 12)  # longer than the sliding window of the families that have one


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2", "phi3", "opt", "gpt2"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    """A model of five blocks."""
    path = tmp_path_factory.mktemp("without") / "model"
    settings = {key: value for key, value in FAMILIES[request.param].to_dict().items() if key != "layer_types"}
    number = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "five", type(FAMILIES[request.param])(**settings | {number: NUM_BLOCKS}))
        save_tiny("five", path)
    with closing(Checkpoint.open(path)) as checkpoint:
        yield Skeleton(checkpoint, torch.device("cpu"), torch.float32)


def without(dense: Skeleton, block: int) -> Skeleton:
    return narrowed(dense, Shape(kept=tuple(b for b in range(dense.num_blocks) if b != block)))


def found(
    dense: Skeleton, blocks: list[int], memory: Memory, between_blocks: Callable[[], None] = lambda: None
) -> dict[int, float]:
    told: dict[int, float] = {}
    evaluate_without_each(
        dense, blocks, lambda block: without(dense, block), TOKENS_NT, told.__setitem__,
        batch=2, between_blocks=between_blocks, memory=memory,
    )  # fmt: skip
    return told


def test_every_figure_is_that_of_a_whole_pass_to_the_bit(dense: Skeleton, tmp_path: Path) -> None:
    whole = {
        block: evaluate(without(dense, block), TOKENS_NT, 2, Silent(), "", lambda: None, unlimited())
        for block in (1, 2, 3)
    }
    assert len(set(whole.values())) == 3
    assert found(dense, [1, 2, 3], unlimited()) == whole
    assert found(dense, [2], unlimited()) == {2: whole[2]}  # those between are run, and not tried
    with disk(tmp_path, "threads") as place:
        on_disk = Memory(budget=place.budget, store=place.store(2), pager=place.pager)
        assert found(dense, [1, 3], on_disk) == {1: whole[1], 3: whole[3]}
        assert place.files() == []


def test_as_many_blocks_are_run_as_are_planned(dense: Skeleton) -> None:
    num_run = 0

    def count() -> None:
        nonlocal num_run
        num_run += 1

    found(dense, [1, 2, 3], unlimited(), count)
    planned = choosing_of(Sleb(), NUM_BLOCKS, 1)
    assert (num_run, planned.embedded, planned.models) == (planned.blocks, 1, 3)
    assert num_run < 3 * (NUM_BLOCKS - 1)


def test_it_may_be_ended_between_any_two_blocks(dense: Skeleton) -> None:
    def stop() -> None:
        raise RunStopped("as asked")

    with pytest.raises(RunStopped, match="as asked"):
        found(dense, [1], unlimited(), stop)
