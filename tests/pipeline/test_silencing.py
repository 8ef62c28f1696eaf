"""How many attentions are silenced, and what of a model is idle then."""

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.methods.structured.narrowing import WandaSp
from pipeline.methods.structured.published import TwoSsp
from pipeline.narrower import narrowed
from pipeline.shape import Shape
from pipeline.silencing import attention_numel, num_silenced, part_silenced, writers
from pipeline.skeleton import Skeleton
from pipeline.width import neuron_numel, part_gone, width_left
from tests.tiny import FAMILIES, save_tiny

MLP, ATTENTION = 3 * 48 * 32, 2 * (32 * 32 + 16 * 32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    """A llama of three blocks."""
    directory = tmp_path_factory.mktemp("attentions")
    save_tiny("llama", directory)
    with closing(Checkpoint.open(directory)) as checkpoint:
        yield Skeleton(checkpoint, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("alpha", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("percent", [10, 25, 40])
def test_the_split_is_that_of_the_authors(percent: int, alpha: float, dense: Skeleton) -> None:
    by_hand = round(3 * (percent / 100) ** ((MLP / ATTENTION) / alpha))
    ratio, step = Fraction(percent, 100), TwoSsp(alpha=alpha)
    assert attention_numel(dense) == ATTENTION
    assert num_silenced(step, dense, ratio) == by_hand
    assert part_silenced(step, dense, ratio) * 3 * dense.block_numel(0) == by_hand * ATTENTION
    assert num_silenced(WandaSp(), dense, ratio) == part_silenced(WandaSp(), dense, ratio) == 0


def test_neurons_make_up_the_rest(dense: Skeleton) -> None:
    ratio, step = Fraction(2, 5), TwoSsp(multiple=1)
    width = width_left(step, dense, 0, ratio)
    assert isinstance(width, int)
    assert num_silenced(step, dense, ratio) == 1
    whole = 3 * dense.block_numel(0)
    missing = ratio * whole - (ATTENTION + 3 * (48 - width) * neuron_numel(dense))
    assert -3 * neuron_numel(dense) < missing <= 0
    shape = Shape(kept=(0, 1, 2), width=width, silent=(1,))
    assert part_gone(dense, narrowed(dense, shape)) == pytest.approx(3 * (48 - width) * neuron_numel(dense) / whole)


def test_a_silent_attention_is_read_as_zeros_and_nothing_else_changes(dense: Skeleton) -> None:
    view = narrowed(dense, Shape(kept=(0, 2), silent=(2,))).checkpoint
    (theirs,) = writers(dense, 2)
    ours = theirs.replace(".2.", ".1.")
    assert not view.read(ours).any()
    assert view.tensors[ours].shape == dense.checkpoint.tensors[theirs].shape
    assert view.tensors.keys() - view.shard_of.keys() == {ours}
    for name in view.shard_of:
        assert torch.equal(view.read(name), dense.checkpoint.read(name.replace(".1.", ".2.")))
    assert dense.checkpoint.read(theirs).any()


def test_families_whose_attention_is_not_known_are_refused(tmp_path: Path) -> None:
    assert "gpt2" in FAMILIES
    save_tiny("gpt2", tmp_path)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        with pytest.raises(ConfigError, match=r"no attention of gpt2 can be silenced so far: .* \(wanda_sp, sleb\)"):
            num_silenced(TwoSsp(), skeleton, Fraction(1, 4))
