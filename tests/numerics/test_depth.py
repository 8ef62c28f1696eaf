"""Which blocks go: importance by the book, and the three ways to choose."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.methods.structured.depth import Dropped, ends, greedy, num_to_drop, one_shot, rescored, turned
from tests.correlated import normal

NONE: Dropped = frozenset()


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    inner = sum(a * b for a, b in zip(left, right, strict=True))
    return inner / sqrt(sum(a * a for a in left) * sum(b * b for b in right))


def test_a_block_turns_each_token_by_the_angle_between_its_states() -> None:
    entering, leaving = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    found_BT = turned(entering, leaving)
    for b in range(2):
        for t in range(3):
            expected = 1 - cosine(entering[b, t].tolist(), leaving[b, t].tolist())
            assert found_BT[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_a_token_of_huge_states_counts_as_much_as_any_other() -> None:
    entering = torch.tensor([[[1e6, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    leaving = torch.tensor([[[1e6, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    assert turned(entering, leaving).mean().item() == pytest.approx(1.0)


def test_half_precision_is_widened_first() -> None:
    states = torch.full((1, 1, 4), 300.0, dtype=torch.float16)  # its square overflows
    assert turned(states, states).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "depth_fraction", "expected"),
    [("0.2", "0.5", 3), ("0.2", "1", 6), ("0.2", "0", 0), ("0.1", "0.3", 0), ("0.99", "1", 28)],
)
def test_as_many_blocks_go_as_fit_into_their_part(ratio: str, depth_fraction: str, expected: int) -> None:
    assert num_to_drop(30, Fraction(ratio), Fraction(depth_fraction)) == expected


def test_the_least_important_go_in_order_and_of_equal_ones_the_deeper_first() -> None:
    assert one_shot([0.9, 0.2, 0.1, 0.2, 0.3, 0.05], 3, ends(6)) == [2, 3, 1]


def test_without_protection_any_block_may_go() -> None:
    assert one_shot([0.0, 0.2, 0.1], 1, NONE) == [0]


@given(scores=st.lists(st.floats(0, 2), min_size=3, max_size=12), data=st.data())
def test_no_block_that_stays_matters_less_than_one_that_goes(scores: list[float], data: st.DataObject) -> None:
    num_dropped = data.draw(st.integers(0, len(scores) - 2))
    gone = one_shot(scores, num_dropped, ends(len(scores)))
    stay = set(range(1, len(scores) - 1)) - set(gone)
    assert len(set(gone)) == num_dropped
    assert max((scores[b] for b in gone), default=0) <= min((scores[b] for b in stay), default=2)


def test_rescoring_sees_that_one_of_two_alike_is_needed_once_the_other_is_gone() -> None:
    def survey(gone: Dropped) -> list[float]:
        pair = [0.1, 0.2] if not gone & {1, 2} else [0.9, 0.9]
        return [1.0, *pair, 0.3, 0.4, 1.0]

    assert one_shot(survey(NONE), 2, ends(6)) == [1, 2]
    assert rescored(survey, 6, 2, ends(6)) == [1, 3]


@given(scores=st.lists(st.floats(0, 2), min_size=3, max_size=9), data=st.data())
def test_where_nothing_changes_rescoring_is_one_shot(scores: list[float], data: st.DataObject) -> None:
    num_dropped = data.draw(st.integers(0, len(scores) - 2))
    protected = ends(len(scores))
    assert rescored(lambda gone: scores, len(scores), num_dropped, protected) == one_shot(
        scores, num_dropped, protected
    )


def test_greedy_removal_takes_the_block_whose_loss_is_least_and_looks_again() -> None:
    losses = {frozenset({1}): 5.0, frozenset({2}): 4.0, frozenset({3}): 6.0}
    losses |= {frozenset(pair): 10.0 - pair[1] for pair in combinations([1, 2, 3], 2)}
    asked: list[Dropped] = []

    def loss(gone: Dropped) -> float:
        asked.append(gone)
        return losses[gone]

    assert greedy(loss, range(5), 2, ends(5)) == [2, 3]
    assert asked == [{1}, {2}, {3}, {1, 2}, {2, 3}]


def test_of_equal_losses_the_deeper_block_goes() -> None:
    assert greedy(lambda gone: 0.0, range(5), 3, ends(5)) == [3, 2, 1]
