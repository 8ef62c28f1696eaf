"""How a model is split over workers: its blocks into stages, the calibration sequences over a stage's replicas."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from pipeline.cluster_config import Handoff
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which stage owns which blocks, how many replicas each stage has, and how stages hand on."""

    stages: tuple[range, ...]
    """Blocks of each stage: contiguous, none empty, the first from block 0."""

    replicas: int
    """Workers of each stage; they share its calibration sequences."""

    handoff: Handoff

    def __post_init__(self) -> None:
        assert self.replicas >= 1, self.replicas
        assert self.stages, "no stages"
        assert all(stage.step == 1 and len(stage) > 0 for stage in self.stages), self.stages
        starts = (0, *(stage.stop for stage in self.stages))
        assert all(stage.start == start for stage, start in zip(self.stages, starts, strict=False)), self.stages

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all stages."""
        return self.stages[-1].stop

    @property
    def num_workers(self) -> int:
        """Replicas of all stages."""
        return self.num_stages * self.replicas

    @property
    def bounds(self) -> tuple[int, ...]:
        """First block of each stage, and at last the number of blocks: plain numbers, for the ledger."""
        return (0, *(stage.stop for stage in self.stages))

    def stage_of(self, block: int) -> int:
        """Return the stage that owns a block."""
        assert 0 <= block < self.num_blocks, (block, self.num_blocks)
        return bisect_right(self.bounds, block) - 1


def partition(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Split blocks with these costs into stages whose largest cost is as small as it can be.

    Of all such splits it is the most even one: with the least sum of squared stage costs; where that too is equal,
    the one whose earlier stages have more blocks. Sums are exact, so rounding decides nothing. Raises ConfigError
    where there is no block for every stage.
    """
    if not 1 <= num_stages <= len(costs):
        raise ConfigError(
            f"cluster.stages: {num_stages} stages for {len(costs)} blocks; every stage needs at least one block: "
            f"ask for 1 to {len(costs)}"
        )
    sums = _exact_sums(costs)
    bounds = (0, *_most_even(sums, num_stages, _smallest_limit(sums, num_stages)))
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def split_sequences(num_sequences: int, batch: int, replicas: int) -> tuple[range, ...]:
    """Return the sequences of each replica: contiguous, cut between batches, as even as possible, earlier ones longer.

    Raises ConfigError where there is no batch for every replica.
    """
    num_batches = -(-num_sequences // batch)
    if not 1 <= replicas <= num_batches:
        raise ConfigError(
            f"cluster.replicas: {replicas} replicas for {num_batches} batches ({num_sequences} sequences, {batch} in "
            f"each); every replica needs at least one batch: ask for 1 to {num_batches}, lower compute.batch, or "
            "raise calibration.sequences"
        )
    each, longer = divmod(num_batches, replicas)
    counts = [each + 1] * longer + [each] * (replicas - longer)
    ends = [min(end * batch, num_sequences) for end in accumulate(counts)]
    return tuple(range(start, stop) for start, stop in pairwise((0, *ends)))


def _exact_sums(costs: Sequence[float]) -> list[int]:
    """Return the cost of all blocks before each one, and of all: floats scaled by a power of two to whole numbers."""
    exact = [Fraction(cost) for cost in costs]
    assert all(cost >= 0 for cost in exact), costs
    scale = max(cost.denominator for cost in exact)
    return list(accumulate((int(cost * scale) for cost in exact), initial=0))


def _smallest_limit(sums: Sequence[int], num_stages: int) -> int:
    """Return the smallest cost that no stage has to exceed: it is the cost of some run of blocks."""
    runs = sorted({stop - start for i, start in enumerate(sums) for stop in sums[i + 1 :]})
    return runs[bisect_left(runs, True, key=lambda limit: _stages_needed(sums, limit) <= num_stages)]


def _stages_needed(sums: Sequence[int], limit: int) -> int:
    """Return the fewest stages within the limit, or more than there are blocks where one block exceeds it."""
    count, start = 1, 0
    for before, after in pairwise(sums):
        if after - before > limit:
            return len(sums)
        if after - start > limit:
            count, start = count + 1, before
    return count


def _most_even(sums: Sequence[int], num_stages: int, limit: int) -> tuple[int, ...]:
    """Return where each stage ends, for the least sum of squared costs with no stage above the limit."""
    num_blocks = len(sums) - 1
    # By first block: the least sum of squares of splitting the rest into so many stages, and where these end.
    best: dict[int, tuple[int, tuple[int, ...]]] = {num_blocks: (0, ())}
    for _ in range(num_stages):
        longer = {}
        for start in range(num_blocks):
            within = bisect_right(sums, sums[start] + limit)
            options = [
                ((sums[stop] - sums[start]) ** 2 + best[stop][0], (stop, *best[stop][1]))
                for stop in range(start + 1, within)
                if stop in best
            ]
            if options:
                longer[start] = min(options, key=lambda option: (option[0], -option[1][0]))
        best = longer
    return best[0][1]
