"""Which blocks a model can do without, judged by how little each turns the hidden states that pass it.

A block's importance is the mean over all tokens of `1 - cos(x, y)` with x the hidden state of a token as it enters the
block and y as it leaves (ShortGPT's block influence, 2403.03853, equation 1). One cosine of all tokens together would
see only the few whose hidden states are huge. Blocks of little importance go: all at once by one survey (`one_shot`);
one by one, with the model surveyed anew without those that are gone (`rescored`); or one by one, each time the one
without which the model's own loss is least (`greedy`: SLEB, 2402.09025).

The first and the last block are protected: what a model reads and says passes through them.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor

import torch
from torch.nn.functional import cosine_similarity

Dropped = frozenset[int]
"""Blocks that are gone, by their number in the dense model."""


def turned(entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of every token before and after a block, float32 [B, T]."""
    return 1 - cosine_similarity(entering_BTD.float(), leaving_BTD.float(), dim=-1)


def ends(num_blocks: int) -> Dropped:
    """Return the blocks that are protected: the first and the last."""
    return frozenset({0, num_blocks - 1})


def num_to_drop(num_blocks: int, ratio: Fraction, depth_fraction: Fraction, num_protected: int = 2) -> int:
    """Return how many whole blocks fit into their part of what is to be removed.

    ratio: part of the parameters of all blocks (of equal size) that is to go; depth_fraction: part of that which goes
    by whole blocks.
    """
    return min(floor(depth_fraction * ratio * num_blocks), max(0, num_blocks - num_protected))


def one_shot(importance: Sequence[float], num_dropped: int, protected: Dropped) -> list[int]:
    """Return the blocks of least importance in the order they go; of equal ones the deeper goes first."""
    candidates = [block for block in range(len(importance)) if block not in protected]
    assert num_dropped <= len(candidates), f"{num_dropped} of {len(candidates)} blocks that may go"
    return sorted(candidates, key=lambda block: (importance[block], -block))[:num_dropped]


def rescored(
    survey: Callable[[Dropped], Sequence[float]], num_blocks: int, num_dropped: int, protected: Dropped
) -> list[int]:
    """Return the blocks that go, in order: after each the importance of those that are left is surveyed anew.

    survey: given the blocks that are gone, the importance of every block of the dense model; that of blocks that are
    gone is not looked at.
    """
    gone: list[int] = []
    for _ in range(num_dropped):
        importance = survey(frozenset(gone))
        assert len(importance) == num_blocks, f"{len(importance)} scores of {num_blocks} blocks"
        gone += one_shot(importance, 1, protected | frozenset(gone))
    return gone


def greedy(loss: Callable[[Dropped], float], units: Sequence[int], num_dropped: int, protected: Dropped) -> list[int]:
    """Return the units (blocks, or attentions) that go, in order: each time the one whose loss is least without it.

    loss: of the model without some units. Of equal ones the deeper goes first. Takes about `len(units) * num_dropped`
    losses.
    """
    return greedy_by_rounds(
        lambda gone, candidates: [loss(gone | {unit}) for unit in candidates], units, num_dropped, protected
    )


def greedy_by_rounds(
    losses: Callable[[Dropped, Sequence[int]], Sequence[float]],
    units: Sequence[int],
    num_dropped: int,
    protected: Dropped,
) -> list[int]:
    """Return what `greedy` does, where a round's losses are made together.

    losses: of the model without the units that are gone and each of the candidates, which are in ascending order.
    """
    gone: list[int] = []
    for _ in range(num_dropped):
        candidates = [unit for unit in sorted(units) if unit not in protected and unit not in gone]
        assert candidates, f"all {len(gone)} units that may go are gone"
        without = dict(zip(candidates, losses(frozenset(gone), candidates), strict=True))
        gone.append(min(candidates, key=lambda unit: (without[unit], -unit)))
    return gone
