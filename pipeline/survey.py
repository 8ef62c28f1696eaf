"""One pass over the whole dense model before it is pruned: what there is to know of its blocks beside each other.

The calibration sequences run through block after block, one of them in memory at a time, and observers look on: at
the hidden states that enter and leave each block, batch by batch, and then at its weights and its linears' inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.activations import Boundary
from pipeline.inputs import embed_tokens
from pipeline.linears import Collector
from pipeline.memory import Memory
from pipeline.numerics import naming_block
from pipeline.order import linears_to_prune
from pipeline.progress import Progress
from pipeline.skeleton import Skeleton
from pipeline.statistics import Gathered, Statistic
from pipeline.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedBlock:
    """A dense block that all sequences have run through; good until the observer returns."""

    index: int
    weights: Mapping[str, torch.Tensor]
    """weight_OD of every linear that is to be pruned, by its name within the block."""

    gathered: Callable[[str], Gathered]
    """Statistics of a linear's inputs, by its name."""


class Observer(Protocol):
    """Looks at every block as the survey comes by, in the order of the blocks."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """What it needs to know of every linear's inputs."""

    def see(self, index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
        """Look at the hidden states of a batch before and after a block; they are not to be changed or kept."""

    def judge(self, block: SurveyedBlock) -> None:
        """Look at a block once all batches have passed."""


@torch.no_grad()
def survey(
    skeleton: Skeleton,
    tokens_NT: torch.Tensor,
    observers: Sequence[Observer],
    *,
    skip: tuple[str, ...],
    batch: int,
    memory: Memory,
    progress: Progress,
    between_blocks: Callable[[], None],
) -> None:
    """Run tokens_NT through the dense model, `batch` sequences at a time, under the eyes of the observers.

    skip: linears that are not to be pruned. `between_blocks` is called after every block, and may raise to end the
    survey. Raises NumericsError where hidden states are not finite.
    """
    num_blocks = skeleton.num_blocks
    progress.begin("survey", num_blocks, 0)
    with memory.phase("embed"):
        boundary = embed_tokens(skeleton, tokens_NT, batch, memory.store, "surveyed")
    with boundary, memory.phase("survey"), memory.weights_of(skeleton) as weights:
        stream = Stream(skeleton, skeleton.checkpoint)
        for index in range(num_blocks):
            progress.phase(index, "survey")
            weights.load(index)
            if memory.ahead and index + 1 < num_blocks:
                weights.expect(index + 1)
            _look_at(stream, index, skeleton, boundary, observers, skip, batch)
            weights.drop(index)
            progress.advance(index, "")
            between_blocks()
        memory.count(weights, boundary)
    progress.end()


def _look_at(
    stream: Stream,
    index: int,
    skeleton: Skeleton,
    boundary: Boundary,
    observers: Sequence[Observer],
    skip: tuple[str, ...],
    batch: int,
) -> None:
    """Run one block, which is loaded, over all sequences, and have the observers judge it."""
    block = skeleton.blocks[index]
    linears = linears_to_prune(block, skip)
    collector = Collector(linears, tuple(dict.fromkeys(kind for o in observers for kind in o.statistics)))
    for sequences, entering_BTD in boundary.stream(batch, stream.device):
        with collector.watching(block, to_the_end=True):
            leaving_BTD = stream.run_block(index, entering_BTD)
        for observer in observers:
            observer.see(index, entering_BTD, leaving_BTD)
        boundary.write(sequences, leaving_BTD, f"dense block {index}")
    with naming_block(index):
        collector.check_finite()
    weights = {linear.name: linear.weight(block) for linear in linears}
    for observer in observers:
        observer.judge(SurveyedBlock(index=index, weights=weights, gathered=collector.gathered))
