"""A pruning job in numbers: seconds and bytes of every block, and what its recipe needs.

All figures are those of one worker that has all calibration sequences; `forecast` spreads them over stages and
replicas. They come from a run that has been measured (`shape_from_measured`), or from shapes (`cost_model`).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """One block on one worker with all calibration sequences: seconds by phase, and bytes."""

    read: float
    collect: float
    prune: float
    commit: float
    propagate: float
    dense_forward: float
    """Running the dense block over all sequences, in the dense pass of handoff `dense`."""

    weight_bytes: int
    """Of the block: read, written, and held while it is pruned."""

    statistics_bytes: int = 0
    """Summed over replicas before solving."""

    solved_bytes: int = 0
    """Masks and weights that the replica which made them sends to all others."""

    @property
    def seconds(self) -> float:
        """All phases of the block's transaction."""
        return self.read + self.collect + self.prune + self.commit + self.propagate


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """A whole job in numbers: its blocks, its calibration set, and what its recipe needs."""

    blocks: tuple[BlockCost, ...]
    num_sequences: int
    batch: int
    """Sequences that run through a block, and are handed on, together."""

    boundary_bytes: int
    """Hidden states of all sequences between two blocks."""

    num_boundaries: int = 1
    """Boundaries held at once: the pruned stream, and the targets or the dense stream where the recipe asks."""

    needs_dense_stream: bool = False
    """Whether handoff `pruned` hands on the dense stream too."""

    replicated: float = 0.0
    """Share of `prune` that replicas do not divide between them."""

    gradient_bytes: int = 0
    """Summed over replicas at every update of a block step."""

    num_updates: int = 0
    """Updates per block when one replica has all sequences."""

    working_bytes: int = 0
    """Held where blocks run, beyond a block's weights, at the peak of pruning it: statistics, masks, temporaries."""

    activation_bytes: int = 0
    """Held where blocks run while one batch goes through a block."""

    resident_bytes: int | None = None
    """Most weights a stage holds for the dense pass, or None for any number; a stage that has more reads them in
    rounds, one block at a time."""

    dense_rounds: int = 4
    """Such rounds: the sequences are cut in so many parts, each of which reads all weights anew."""

    def __post_init__(self) -> None:
        assert self.blocks, "no blocks"
        assert 0 <= self.replicated <= 1, self.replicated
        assert min(self.num_sequences, self.batch, self.dense_rounds) >= 1, self

    @property
    def num_batches(self) -> int:
        """Batches of all sequences."""
        return -(-self.num_sequences // self.batch)

    @property
    def seconds_alone(self) -> float:
        """One worker, all phases in turn; nobody needs the outputs of the last block."""
        return sum(block.seconds for block in self.blocks) - self.blocks[-1].propagate


def shape_from_measured(
    phase_seconds_per_block: Mapping[str, float],
    *,
    num_blocks: int,
    num_sequences: int,
    batch: int,
    weight_bytes: int,
    boundary_bytes: int,
    num_boundaries: int = 1,
    needs_dense_stream: bool = False,
) -> JobShape:
    """Return the shape of a job that has run on one worker, from its report's phases divided by its blocks."""
    block = BlockCost(
        read=phase_seconds_per_block["read"],
        collect=phase_seconds_per_block["collect"],
        prune=phase_seconds_per_block["prune"],
        commit=phase_seconds_per_block["commit"],
        propagate=phase_seconds_per_block["propagate"],
        dense_forward=phase_seconds_per_block["propagate"],
        weight_bytes=weight_bytes,
    )
    return JobShape(
        blocks=(block,) * num_blocks,
        num_sequences=num_sequences,
        batch=batch,
        boundary_bytes=boundary_bytes,
        num_boundaries=num_boundaries,
        needs_dense_stream=needs_dense_stream,
    )
