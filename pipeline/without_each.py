"""The loss of a model without each of some of its blocks: a trial begins at the block that it is without.

    entering    the hidden states that enter the block at hand, made by all blocks before it
    evaluated   made from them by the blocks after it alone, as if it were not there, down to the head

What is before the missing block is the same with it and without: it is run once for all trials, which takes about half
the work of running each of them whole, and gives the same numbers to the bit.
"""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from pipeline.evaluate import evaluate_from
from pipeline.inputs import embed_tokens, run_dense_block
from pipeline.memory import Memory
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream


def evaluate_without_each(
    skeleton: Skeleton,
    blocks: Sequence[int],
    without: Callable[[int], Skeleton],
    tokens_NT: torch.Tensor,
    found: Callable[[int, float], None],
    *,
    batch: int,
    between_blocks: Callable[[], None],
    memory: Memory,
) -> None:
    """Tell `found` each of the blocks, in ascending order, and the perplexity of the model without it.

    without: the model without one of its blocks, which is not its last, or with less of it in its place.
    `between_blocks` is called after every block that has run, and may raise to end this.
    """
    stream = Stream(skeleton, skeleton.checkpoint)
    with closing(embed_tokens(skeleton, tokens_NT, batch, memory.store, "entering")) as entering:
        for block in range(max(blocks) + 1):
            if block in blocks:
                smaller = without(block)
                found(block, evaluate_from(smaller, block, entering, tokens_NT, batch, between_blocks, memory))
            if block < max(blocks):
                with memory.weights_of(skeleton) as weights:
                    run_dense_block(stream, weights, entering, block, None, batch)
                between_blocks()
