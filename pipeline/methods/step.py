"""The two kinds of step a recipe is made of, and what each one sees of a block.

A *linear step* prunes one matrix from a statistic of its inputs; a *block step* sees the whole block with its
streams. A step is a frozen set of options with one method; it holds no state between blocks.

Shapes: O = out features, D = in features, B = sequences, T = tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from pipeline.lazy_weights import Maker
from pipeline.sparsity import Sparsity
from pipeline.statistics import Statistic

Shapes = Mapping[str, tuple[int, int]]
"""(O, D) of every linear of a block, by its name."""


def num_weights(shapes: Shapes) -> int:
    """Return how many weights the linears have together."""
    return sum(rows * columns for rows, columns in shapes.values())


def largest(shapes: Shapes) -> int:
    """Return how many weights the largest linear has."""
    return max(rows * columns for rows, columns in shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedLinear:
    """What a step makes of one linear."""

    keep_OD: torch.Tensor
    """bool, True = kept."""

    weight_OD: torch.Tensor | None = None
    """New values of the weights (zero where pruned), or None where kept weights are the dense ones."""

    notes: dict[str, float] = field(default_factory=dict)
    """Figures worth recording with the commit, such as the damping that was needed."""


Solver = Callable[[torch.Tensor, torch.Tensor | None, Sparsity], PrunedLinear]
"""(weight_OD, keep_OD of an earlier step or None, sparsity) -> PrunedLinear."""

Report = Callable[[Mapping[str, float]], None]
"""Receives figures of a long step while it works (loss, sparsity), for the progress display."""


class Step(BaseModel, ABC):
    """Options of one step; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    statistic: ClassVar[type[Statistic] | None]
    """What it needs to know of each linear's inputs."""

    accepts_mask: ClassVar[bool] = False
    """Whether it can follow a step that has already chosen a mask."""

    accepts_pattern: ClassVar[bool] = True
    """Whether it can prune to N:M."""

    @abstractmethod
    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Return the most bytes it holds at once: its results and what making them takes.

        Beyond them there are the block's weights (of `dtype`), the statistics, and the activations of a batch. groups:
        names of the linears that share an input, in the order they are pruned.
        """


class LinearStep(Step):
    """Prunes one linear at a time."""

    def rows_alone(self, sparsity: Sparsity) -> bool:
        """Tell whether each row is pruned without regard to the others, so that replicas may share them out."""
        return False

    @abstractmethod
    def solver(self, statistic: Statistic | None) -> Solver:
        """Prepare once what all linears with this input share; the result then prunes each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """What one update of a block step sees: sequences of all replicas, of which some are here."""

    here: slice
    """Sequences at hand; none, where other replicas have more of them than this one."""

    weight: float
    """Their part of all sequences of the update."""


class BlockView(Protocol):
    """A dense block, its streams and statistics, as a block step sees them. The weights are never changed."""

    @property
    def num_replicas(self) -> int:
        """Replicas that work on this block, each with its own part of the sequences."""

    def mini_batches(self, size: int) -> list[MiniBatch]:
        """Return the updates of one pass over the calibration: `size` sequences of every replica in each."""

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors (gradients), in place, by their sums over all replicas."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """weight_OD of every linear, by its name within the block."""

    def statistic(self, name: str, kind: type[Statistic]) -> Statistic:
        """Statistic of a linear's inputs."""

    def output(self, weights: Mapping[str, Maker], sequences: slice) -> torch.Tensor:
        """Run the block on the pruned stream with other weights: hidden_BTD, differentiable in what they are made of.

        weights: name of a linear -> what makes its weight_OD, called when the linear runs, and again in the backward
        pass: a made weight is never kept.
        """

    def target(self, sequences: slice) -> torch.Tensor:
        """Return the hidden_BTD that the pruned block is to reproduce."""


class BlockStep(Step):
    """Prunes the linears of a block together."""

    @abstractmethod
    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> dict[str, PrunedLinear]:
        """Return every linear of the block, pruned."""

    @property
    @abstractmethod
    def needs_dense_stream(self) -> bool:
        """Whether targets come from the dense block on the dense stream (else on the pruned stream)."""
