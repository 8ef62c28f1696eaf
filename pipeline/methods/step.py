"""The two kinds of step a recipe is made of, and what each one sees of a block.

A *linear step* prunes one matrix from statistics of its inputs; a *block step* sees the whole block with its
streams. A step is a frozen set of options with one method; it holds no state between blocks.

Shapes: O = out features, D = in features, B = sequences, T = tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from pipeline.anatomy import Cut
from pipeline.lazy_weights import Maker
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import AnyStatistic, Gathered, Statistic
from pipeline.stream_names import StreamName

NOTHING: Mapping[str, torch.Tensor] = {}
"""No parameters at all."""

Shapes = Mapping[str, tuple[int, int]]
"""(O, D) of every linear of a block, by its name."""


def loss_scale(output_BTD: torch.Tensor) -> float:
    """Return what to multiply a mean over such outputs by before its backward pass, and its gradients to divide by.

    In float16 the gradient of each of so many numbers would be rounded to nothing; a power of two loses none.
    """
    return 2.0 ** (output_BTD.numel().bit_length() - 1) if output_BTD.dtype == torch.float16 else 1.0


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

    sparsity: Sparsity | None = None
    """What it was pruned to, where the step has chosen that itself; None where it is the block's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedBlock:
    """What a block step makes of a block."""

    linears: dict[str, PrunedLinear]
    """Every linear by its name."""

    others: dict[str, torch.Tensor] = field(default_factory=dict)
    """New values of vectors (norms, biases), by their name within the block; the rest stay as they are."""

    cut: Cut | None = None
    """What has been taken out of it before; all shapes are those of what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearView:
    """One linear, as a linear step sees it. Its tensors are never changed."""

    dense_OD: torch.Tensor
    """The weights of the source."""

    sparsity: Sparsity
    """To be met."""

    keep_OD: torch.Tensor | None = None
    """The mask that the steps before have chosen, if any."""

    updated_OD: torch.Tensor | None = None
    """New values of the weights (zero where pruned), where a step before has changed the kept ones."""

    @property
    def weight_OD(self) -> torch.Tensor:
        """Kept weights as the steps before have left them; what is pruned may still be there."""
        return self.dense_OD if self.updated_OD is None else self.updated_OD

    def rows(self, rows: slice) -> "LinearView":
        """Return some of its rows."""
        return LinearView(
            dense_OD=self.dense_OD[rows],
            sparsity=self.sparsity,
            keep_OD=None if self.keep_OD is None else self.keep_OD[rows],
            updated_OD=None if self.updated_OD is None else self.updated_OD[rows],
        )


Solver = Callable[[LinearView], PrunedLinear]
"""Prunes one linear."""

Report = Callable[[Mapping[str, float]], None]
"""Receives figures of a long step while it works (loss, sparsity), for the progress display."""


class Step(BaseModel, ABC):
    """Options of one step; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    accepts_mask: ClassVar[bool] = False
    """Whether it can follow a step that has already chosen a mask."""

    needs_mask: ClassVar[bool] = False
    """Whether it only works on a mask that is there, and so cannot come first."""

    rewrites: ClassVar[bool] = False
    """Whether it gives kept weights new values."""

    @property
    def quantises(self) -> bool:
        """Whether it puts kept weights on grids, which a later step would take them off."""
        return False

    def refusal(self, sparsity: Sparsity) -> str | None:
        """Say why it cannot prune so, and what can; None where it can."""
        return None

    def rounding(self, sparsity: Sparsity, shapes: Shapes) -> int:
        """Return by how many weights of a block it may miss what is asked, where it is the one to choose the mask.

        Of a fraction it drops that many fewer at most (less than one a row), and never more; under an N:M pattern that
        many more at most (none, where every group has the pattern), and never fewer.
        """
        return 0 if isinstance(sparsity, SemiStructured) else sum(rows for rows, _ in shapes.values())

    @property
    @abstractmethod
    def statistics(self) -> tuple[type[Statistic], ...]:
        """What it needs to know of each linear's inputs."""

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
    def solver(self, gathered: Gathered) -> Solver:
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

    @property
    def num_sequences(self) -> int:
        """Sequences at hand."""

    def num_mini_batches(self, size: int) -> int:
        """Return how many updates a pass over the calibration has, with `size` sequences of every replica in each."""

    def mini_batches(self, size: int, order: Sequence[int] | None = None) -> list[MiniBatch]:
        """Return those updates in the order that their numbers stand in `order`; all, as they come, where it is None.

        The sequences are about to be read, in this order.
        """

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors (gradients), in place, by their sums over all replicas."""

    def from_the_first(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor, in place, by what the first replica has of it."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """weight_OD of every linear, by its name within the block."""

    @property
    def others(self) -> Mapping[str, torch.Tensor]:
        """The block's vectors (norms, biases), dense, by their name within the block."""

    @property
    def tuned(self) -> Mapping[str, torch.Tensor]:
        """New values that the steps before have given to some of these; `output` runs with them."""

    @property
    def so_far(self) -> Mapping[str, PrunedLinear]:
        """What the steps before have made of each linear; empty for the first."""

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        """Return a statistic of a linear's inputs."""

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        """Run the block on the pruned stream with other weights: hidden_BTD, differentiable in what they are made of.

        weights: name of a linear -> what makes its weight_OD, called when the linear runs, and again in the backward
        pass: a made weight is never kept. others: values to take the place of other parameters.
        """

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        """Return the hidden_BTD that the pruned block is to reproduce: the dense block's outputs on that stream."""


class BlockStep(Step):
    """Prunes the linears of a block together."""

    target: StreamName
    """Stream on which the dense block makes the outputs that the pruned block is to reproduce."""

    epochs: int
    """Passes over the calibration sequences."""

    batch: int
    """Sequences per update, of each replica."""

    @abstractmethod
    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> PrunedBlock:
        """Return every linear of the block, pruned."""
