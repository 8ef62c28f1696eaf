"""What pruning a block takes, counted from shapes alone: arithmetic, memory traffic, bytes read and written.

Nothing here knows how fast anything is. The plan divides these counts by speeds measured on one machine, the
cluster's forecast by those of an accelerator; so both are of one opinion about what there is to do.

N sequences of T tokens run through a block; a *group* is the linears that share one input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from pipeline.linears import Linear
from pipeline.order import linears_to_prune
from pipeline.recipe import Recipe
from pipeline.statistics import Gram

Linears = Sequence[tuple[int, int]]
"""Linears that share one input: (out features, in features) of each."""

COUNTING_BYTES = 48
"""Memory traffic per weight of counting outliers: scores made, widened and summed, made again and compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What something takes; counts of one thing after another add up."""

    gemm: float = 0.0
    """Operations of a block's matrix products, in its dtype."""

    gram: float = 0.0
    """Operations of float32 products: Gram matrices, and the updates of methods that use them."""

    factor: float = 0.0
    """Operations of float32 factorisations."""

    double: float = 0.0
    """Operations of float64 products."""

    double_factor: float = 0.0
    """Operations of float64 factorisations."""

    columns: int = 0
    """Steps of SparseGPT from one column to the next."""

    memory: float = 0.0
    """Bytes to and from the memory where blocks run, beside those of matrix products."""

    weights_read: int = 0
    """Bytes of weights read from disk."""

    weights_written: int = 0
    """Bytes of weights written to disk, and hashed."""

    hidden_read: int = 0
    """Bytes of hidden states read from where they are kept."""

    hidden_written: int = 0
    """Bytes of hidden states written there."""

    @property
    def flops(self) -> float:
        """All operations."""
        return self.gemm + self.gram + self.factor + self.double + self.double_factor

    def times(self, number: int) -> "Count":
        """Return the count of so many of it."""
        return Count(**{f.name: number * getattr(self, f.name) for f in fields(Count)})

    def __add__(self, other: "Count") -> "Count":
        """Return the count of both."""
        return Count(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Count)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model of equal blocks, and the calibration sequences that run through them."""

    groups: tuple[Linears, ...]
    """A block's linears in the order they run."""

    left: tuple[Linears, ...] | None = None
    """The same once neurons have been taken out of the block; None where all stay."""

    hidden: int
    """Features of the hidden states."""

    num_blocks: int
    num_sequences: int
    num_tokens: int
    """Per sequence."""

    batch: int = 1
    dtype_bytes: int = 2
    """Of a number where blocks run."""

    stored_bytes: int = 2
    """Of a weight on disk."""

    @property
    def cut(self) -> "Workload":
        """The same of blocks that have lost what they are to lose, as they are pruned further, run and written."""
        return self if self.left is None else replace(self, groups=self.left, left=None)

    @property
    def num_weights(self) -> int:
        """Prunable weights of a block."""
        return sum(weights_of(group) for group in self.groups)

    @property
    def num_rows(self) -> int:
        """Out features of all linears of a block."""
        return sum(rows for group in self.groups for rows, _ in group)

    @property
    def widths(self) -> list[int]:
        """Features of each distinct input."""
        return [group[0][1] for group in self.groups]

    @property
    def num_neurons(self) -> int:
        """Of the MLP: features that its last linear, the last of all, reads."""
        return self.widths[-1]

    @property
    def num_head_features(self) -> int:
        """Of the query heads: features that the attention's last linear reads, which runs second of all."""
        return self.widths[1] if len(self.widths) > 1 else 0

    @property
    def all_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_sequences * self.num_tokens

    @property
    def boundary_bytes(self) -> int:
        """Hidden states of all sequences between two blocks."""
        return self.all_tokens * self.hidden * self.dtype_bytes

    @property
    def forward_flops(self) -> float:
        """One pass of all tokens through a block: its linears, and causal attention."""
        return 2.0 * self.all_tokens * (self.num_weights + self.num_tokens * self.hidden)

    @property
    def collect_flops(self) -> float:
        """The same, ended at the input of the last linears: all that statistics need."""
        return self.forward_flops - 2.0 * self.all_tokens * weights_of(self.groups[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What one step of a recipe takes, by how replicas can share it."""

    shared: Count = Count()
    """Divided between replicas."""

    pieces: tuple[Count, ...] = ()
    """Each done by one replica."""

    repeated: Count = Count()
    """Done by every replica."""

    solved_bytes: int = 0
    """Masks and weights that the replica which made them sends to all others."""

    gradient_bytes: int = 0
    """Summed over replicas at every update."""

    num_updates: int = 0

    @property
    def whole(self) -> Count:
        """All of it, for one who works alone."""
        return sum(self.pieces, self.shared + self.repeated)


def count_read(work: Workload) -> Count:
    """Count the reading of a block."""
    return Count(weights_read=work.num_weights * work.stored_bytes)


def count_survey(work: Workload) -> Count:
    """Count one block's part of the survey: read, run over all sequences, and its outliers counted."""
    return count_read(work) + count_propagate(work) + Count(memory=COUNTING_BYTES * work.num_weights)


def count_again(work: Workload, recipe: Recipe) -> Count:
    """Count how statistics are gathered anew, input by input, by runs that end where that input is reached."""
    if recipe.within_block == "joint":
        return Count()
    again, left, narrowing = Count(), work.cut, recipe.narrowing
    if narrowing is not None and narrowing.heads:  # once these are gone, for the neurons; their pairs count in collect
        part = narrowing.num_fitted(work.num_sequences) / work.num_sequences
        again = Count(gemm=part * work.collect_flops, hidden_read=round(part * work.boundary_bytes))
    for number, group in enumerate(left.groups[1:], start=1) if recipe.statistics else ():
        before = sum(weights_of(earlier) for earlier in left.groups[:number]) + work.num_tokens * work.hidden
        gram = 2.0 * work.all_tokens * group[0][1] ** 2 if Gram in recipe.statistics else 0.0
        again += Count(gemm=2.0 * work.all_tokens * before, gram=gram, hidden_read=work.boundary_bytes)
    return again


def count_collect(work: Workload, recipe: Recipe) -> Count:
    """Count the runs of the dense block that gather statistics and targets.

    Where targets come from the dense stream, that stream is advanced too, and its outputs serve as targets.
    """
    boundary, one = work.boundary_bytes, work.boundary_bytes // work.num_sequences
    if recipe.needs_targets:
        flops, traffic = work.forward_flops, Count(hidden_read=boundary, hidden_written=boundary)
    elif recipe.needs_dense_stream or recipe.statistics or recipe.narrowing:
        flops, traffic = work.collect_flops, Count(hidden_read=boundary)
    else:  # only the error of the first sequence is wanted
        flops, traffic = work.forward_flops / work.num_sequences, Count(hidden_read=one)
    if recipe.needs_dense_stream:
        flops, traffic = flops + work.forward_flops, traffic + Count(hidden_read=boundary, hidden_written=boundary)
    gram = 2.0 * work.all_tokens * gram_numel(work) if Gram in recipe.statistics else 0.0
    if recipe.narrowing is not None and Gram in recipe.neuron_statistics:
        num_pairs = sum(width**2 for width in read_units(work, recipe))
        gram += 2.0 * recipe.narrowing.num_fitted(work.num_sequences) * work.num_tokens * num_pairs
    return Count(gemm=flops, gram=gram) + traffic


def count_commit(work: Workload, recipe: Recipe) -> Count:
    """Count the writing of a block, of what is left of it.

    Kept weights that no step has changed are read from the source once more, where blocks run in a narrower dtype, and
    so are blocks that no step prunes.
    """
    rewritten = any(step.rewrites or step.quantises for step in recipe.steps)
    is_copied = not recipe.steps and work.left is None
    is_read = is_copied or (not rewritten and work.dtype_bytes < work.stored_bytes)
    read = work.num_weights * work.stored_bytes if is_read else 0
    return Count(weights_read=read, weights_written=work.cut.num_weights * work.stored_bytes)


def count_propagate(work: Workload) -> Count:
    """Count one run of a block over all sequences; of a pruned one where `work` is of what is left."""
    return Count(gemm=work.forward_flops, hidden_read=work.boundary_bytes, hidden_written=work.boundary_bytes)


def statistics_bytes(work: Workload, recipe: Recipe) -> int:
    """Return the size of all statistics of a block."""
    of_units = sum(kind.bytes_of(n) for kind in recipe.neuron_statistics for n in read_units(work, recipe))
    return of_units + sum(kind.bytes_of(width) for kind in recipe.statistics for width in work.widths)


def read_units(work: Workload, recipe: Recipe) -> list[int]:
    """Return how many features the linears read that are looked at where neurons go, and heads too where some do."""
    if recipe.narrowing is None:
        return []
    return [work.num_neurons, *([work.num_head_features] if recipe.narrowing.heads else [])]


def gram_numel(work: Workload) -> int:
    """Return the inner products of all pairs of features, over all distinct inputs."""
    return sum(width**2 for width in work.widths)


def weights_of(group: Linears) -> int:
    """Return the weights of some linears."""
    return sum(rows * columns for rows, columns in group)


def likely_groups(block: nn.Module, skip: Sequence[str], hidden: int) -> list[list[Linear]]:
    """Return a block's linears by the input they seem to share; only running the block tells for sure.

    Within a module (attention, MLP) those of one width share an input, but for the one that leads back to the
    hidden states, which comes last. Raises ConfigError where nothing is left to prune.
    """
    linears = linears_to_prune(block, tuple(skip))
    groups: dict[tuple[str, int, bool], list[Linear]] = {}
    for linear in linears:
        rows, columns = linear.weight(block).shape
        parent = linear.name.rpartition(".")[0]
        is_first = not any(other[0] == parent for other in groups)
        leads_back = rows == hidden and not is_first and linear.name == _last_of(linears, parent)
        groups.setdefault((parent, columns, leads_back), []).append(linear)
    return list(groups.values())


def shapes_of(block: nn.Module, groups: Sequence[Sequence[Linear]]) -> tuple[Linears, ...]:
    """Return (out features, in features) of every linear, by group."""
    return tuple(tuple(_shape(linear.weight(block)) for linear in group) for group in groups)


def _shape(weight_OD: torch.Tensor) -> tuple[int, int]:
    num_rows, num_columns = weight_OD.shape
    return num_rows, num_columns


def _last_of(linears: Sequence[Linear], parent: str) -> str:
    return [n.name for n in linears if n.name.rpartition(".")[0] == parent][-1]
