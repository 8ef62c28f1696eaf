"""How many neurons are left follows from the headers alone."""

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.methods.structured.narrowing import Comp, WandaSp
from pipeline.methods.structured.shape_step import ShortGpt
from pipeline.narrower import narrowed
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from pipeline.width import (
    bytes_left,
    mean_width,
    neuron_numel,
    num_neurons,
    part_gone,
    weights_gone,
    width_left,
    width_of,
)
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    """A llama of three blocks with 48 neurons each."""
    directory = tmp_path_factory.mktemp("width")
    save_tiny("llama", directory)
    with closing(Checkpoint.open(directory)) as checkpoint:
        yield Skeleton(checkpoint, torch.device("cpu"), torch.float32)


def test_a_neuron_is_a_row_of_each_maker_and_a_column_of_the_reader(dense: Skeleton) -> None:
    assert (num_neurons(dense), neuron_numel(dense)) == (48, 3 * 32)


@pytest.mark.parametrize(
    ("step", "num_dropped", "ratio", "width"),
    [
        (WandaSp(), 0, Fraction(1, 4), 27),  # 1936 of a block's 7744 parameters are 20.2 neurons
        (Comp(), 1, Fraction(2, 5), 39),  # 1549 parameters beside the block that goes: 8.1 neurons of each other
        (Comp(), 1, Fraction(1, 3), None),
        (Comp(multiple=16), 0, Fraction(1, 4), 16),
        (ShortGpt(), 1, Fraction(1, 3), None),
    ],
)
def test_blocks_that_go_count_before_neurons_do(
    step: Comp, num_dropped: int, ratio: Fraction, width: int | None, dense: Skeleton
) -> None:
    found = width_left(step, dense, num_dropped, ratio)
    assert found == width
    if isinstance(width, int):
        gone = num_dropped * dense.block_numel(0) + (3 - num_dropped) * (48 - width) * neuron_numel(dense)
        assert gone >= ratio * 3 * dense.block_numel(0)


def test_widths_by_importance_take_as_much_as_one_for_all(dense: Skeleton) -> None:
    step = Comp(widths="per_block", spread=0.5)
    level, uneven = (width_left(step, dense, 0, Fraction(1, 4), own) for own in (None, [0.5, 0.1, 0.2]))
    assert level == (28, 28, 27), "83 of 144 neurons: 60.5 go"
    assert uneven == (35, 14, 34), "of which the first does not count: 20.2 go on average, 13.5 or 33.6 of a block"
    assert width_left(step, dense, 0, Fraction(1, 4), [0.2, 0.2, 0.2]) == (28, 28, 27)
    assert width_left(step, dense, 0, Fraction(17 * 96, 7744), [0.2, 0.2, 0.2]) == 31, "widths that are equal are one"
    assert width_left(step, dense, 1, Fraction(1, 3), [0.2, 0.2]) is None


def test_more_than_the_neurons_hold_is_refused(dense: Skeleton) -> None:
    with pytest.raises(ConfigError, match=r"leaves 134\.4% of the neurons to go, above the most a block may lose, 90%"):
        width_left(WandaSp(), dense, 0, Fraction(4, 5))


def test_what_is_written_of_narrow_blocks_is_counted(dense: Skeleton) -> None:
    total = dense.checkpoint.total_bytes()
    assert bytes_left(dense) == total
    narrow = narrowed(dense, Shape(kept=(0, 1, 2), width=40))
    assert bytes_left(narrow) == total - 3 * 8 * neuron_numel(dense) * 4
    assert narrow.checkpoint.settings()["intermediate_size"] == 40
    assert num_neurons(narrow) == 48  # what is read is dense
    assert (width_of(dense), width_of(narrow)) == (None, 40)
    assert (mean_width(dense), mean_width(narrow)) == (None, 40)


def test_blocks_of_different_widths_are_counted_one_by_one(dense: Skeleton) -> None:
    left = narrowed(dense, Shape(kept=(0, 2), width=(40, 31)))
    assert (width_of(left), mean_width(left)) == ((40, 31), 36)
    gone = dense.block_numel(1) + (8 + 17) * neuron_numel(dense)
    assert bytes_left(left) == dense.checkpoint.total_bytes() - gone * 4
    assert part_gone(dense, left) == pytest.approx(gone / (3 * dense.block_numel(0)))
    assert (weights_gone(left), weights_gone(dense)) == ([8 * 96, 17 * 96], [0, 0, 0])


def test_the_part_that_goes_is_of_whole_blocks_and_neurons(dense: Skeleton) -> None:
    assert part_gone(dense, dense) == 0
    left = narrowed(dense, Shape(kept=(0, 2), width=40))
    gone = dense.block_numel(1) + 2 * 8 * neuron_numel(dense)
    assert part_gone(dense, left) == pytest.approx(gone / (3 * dense.block_numel(0)))
