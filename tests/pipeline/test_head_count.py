"""How many heads are left, and how many neurons then, follows from the headers alone."""

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pipeline.attention import HeadLayout
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.head_count import heads_left, heads_numel, heads_of
from pipeline.methods.structured.narrowing import Comp, WandaSp
from pipeline.methods.structured.shape_step import ShortGpt
from pipeline.narrower import narrowed
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from pipeline.width import bytes_left, neuron_numel, part_gone, weights_gone, width_left
from tests.heads import families_with_heads
from tests.tiny import save_tiny

SIX = HeadLayout(num_heads=6, num_groups=3, head_dim=8)
GROUP_NUMEL = 2 * 8 * 64 + 8 * 64 + 8 * 64 + 2 * 8 * 64
"""Of a group: rows of q, k and v, and columns of o."""


def skeleton_of(family: str, directory: Path) -> Skeleton:
    with families_with_heads():
        save_tiny(family, directory)
    return Skeleton(Checkpoint.open(directory), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    """A llama of three blocks, each with 48 neurons, and 8 query heads in 4 groups."""
    skeleton = skeleton_of("h-llama-wide", tmp_path_factory.mktemp("heads"))
    with closing(skeleton.checkpoint):
        yield skeleton


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (Comp(heads=0.25), SIX),
        (WandaSp(heads=0.49), SIX),
        (Comp(heads=0.5, head_unit="query"), HeadLayout(num_heads=4, num_groups=4, head_dim=8)),
        (Comp(), None),
        (ShortGpt(), None),
    ],
)
def test_heads_are_rounded_down_to_whole_units(step: Comp, left: HeadLayout | None, dense: Skeleton) -> None:
    assert heads_left(step, dense) == left


def test_neurons_give_what_heads_do_not(dense: Skeleton) -> None:
    block = dense.block_numel(0)
    assert heads_numel(dense, SIX) == GROUP_NUMEL
    assert heads_numel(dense, None) == 0
    for num_dropped, ratio in ((0, Fraction(3, 10)), (1, Fraction(1, 2))):
        step = Comp(heads=0.25, multiple=1)
        width = width_left(step, dense, num_dropped, ratio)
        assert isinstance(width, int)
        asked, whole = ratio * 3 * block, num_dropped * block
        gone = [whole + (3 - num_dropped) * (GROUP_NUMEL + n * neuron_numel(dense)) for n in (48 - width, 47 - width)]
        assert gone[1] < asked <= gone[0]


def test_what_is_written_with_fewer_heads_is_counted(dense: Skeleton) -> None:
    left = narrowed(dense, Shape(kept=(0, 2), width=40, heads=SIX))
    assert heads_of(left) == SIX
    assert heads_of(dense) is None
    gone = dense.block_numel(1) + 2 * (8 * neuron_numel(dense) + GROUP_NUMEL)
    assert part_gone(dense, left) == pytest.approx(gone / (3 * dense.block_numel(0)))
    assert bytes_left(left) == dense.checkpoint.total_bytes() - 4 * gone
    assert weights_gone(left) == [8 * neuron_numel(dense) + GROUP_NUMEL] * 2
    assert left.blocks[0].self_attn.q_proj.weight.shape == (64, 64)  # what is read is dense


def test_biases_go_with_heads_and_are_no_weights(tmp_path: Path) -> None:
    dense = skeleton_of("h-qwen2", tmp_path)
    with closing(dense.checkpoint):
        assert heads_numel(dense, SIX) == GROUP_NUMEL + 2 * 8 + 8 + 8
        assert heads_numel(dense, SIX, num_dimensions=2) == GROUP_NUMEL


def test_heads_that_leave_neurons_nothing_to_give_are_refused(dense: Skeleton) -> None:
    message = r"10\.00% of the .*heads that go, with 0 of 3 blocks, are 14\.\d+% already, .* ask for more than that"
    with pytest.raises(ConfigError, match=message):
        width_left(Comp(heads=0.25), dense, 0, Fraction(1, 10))


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        (
            "h-gemma2-wide",
            Comp(heads=0.25),
            r"gemma2 with 6 query heads would not load .* heads may be 0\.5 \(4 left\)",
        ),
        ("h-olmo2", WandaSp(heads=0.25), r"no heads can be removed from the attention of olmo2"),
        ("gpt2", Comp(heads=0.25), r"no heads can be removed from the attention of gpt2"),
    ],
)
def test_what_cannot_be_had_is_refused(family: str, step: Comp, message: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(family, tmp_path)
    with closing(skeleton.checkpoint), pytest.raises(ConfigError, match=message):
        heads_left(step, skeleton)


def test_families_whose_heads_are_not_known_have_them_all(tmp_path: Path) -> None:
    skeleton = skeleton_of("gpt2", tmp_path)
    with closing(skeleton.checkpoint):
        assert heads_of(skeleton) is None
