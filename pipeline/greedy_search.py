"""What a model can best do without, found one by one: each time the unit without which its perplexity rises least.

Units are whole blocks (SLEB, 2402.09025) or the attentions of blocks (2SSP, 2501.17771, but for the order of its
stages: what a run is to write must be settled before its first block is pruned, so attentions are chosen while all
neurons are there). The perplexity is that on the calibration tokens; each is durable as soon as it is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.looking import Looking
from pipeline.memory import Memory
from pipeline.methods.structured.depth import Dropped, ends, greedy_by_rounds
from pipeline.narrower import narrowed
from pipeline.planning.choosing import Choosing
from pipeline.shape import Shape
from pipeline.shape_record import ShapeRecord, listed
from pipeline.skeleton import Skeleton
from pipeline.without_each import evaluate_without_each


@dataclass(frozen=True, slots=True, kw_only=True)
class Removable:
    """What may go of a model; a unit goes by the number of its block in the dense model."""

    protected: Dropped
    """Units that stay."""

    without: Callable[[Dropped], Skeleton]
    """The dense model without some of them."""

    place: Callable[[int, Dropped], int]
    """The number that a unit's block has in the model without some others."""

    named: str
    """What the names of their measurements in the record begin with."""

    told: str
    """What comes before their numbers where a measurement is told."""

    sought: str
    """What is being done while they are chosen."""

    def alone(self, record: ShapeRecord) -> dict[int, float]:
        """Return what the perplexity is without each unit by itself, of those that were measured."""
        named = ((name.removeprefix(self.named), f) for name, f in record.measured.items() if self.named in name)
        return dict(sorted((int(unit), figures[0]) for unit, figures in named if unit.isdigit()))


def blocks_of(dense: Skeleton) -> Removable:
    """Return the blocks of a model; where one is gone, those behind it move up."""

    def without(gone: Dropped) -> Skeleton:
        return narrowed(dense, Shape(kept=tuple(block for block in range(dense.num_blocks) if block not in gone)))

    return Removable(
        protected=ends(dense.num_blocks), without=without,
        place=lambda block, gone: block - sum(other < block for other in gone),
        named="", told="without", sought="the blocks that go were chosen",
    )  # fmt: skip


def attentions_of(dense: Skeleton) -> Removable:
    """Return the attentions of a model's blocks; none is protected."""

    def without(silent: Dropped) -> Skeleton:
        return narrowed(dense, Shape(kept=tuple(range(dense.num_blocks)), silent=tuple(sorted(silent))))

    return Removable(
        protected=frozenset(), without=without, place=lambda block, silent: block,
        named="attentions ", told="without the attention of", sought="the attentions to silence were chosen",
    )  # fmt: skip


def greedy_order(
    units: Removable, num_gone: int, choosing: Choosing, looking: Looking, record: ShapeRecord
) -> list[int]:
    """Return that many units in the order they go; choosing: what that runs.

    Raises RunStopped between blocks, and BudgetExceeded where a model with all its blocks does not fit.
    """
    if num_gone == 0:
        return []
    search = _Search(units, choosing, looking, record)
    looking.progress.begin("choose", choosing.models, 0)
    order = greedy_by_rounds(search.losses, range(looking.dense.num_blocks), num_gone, units.protected)
    looking.progress.end()
    return order


class _Search:
    """Measures a model without some of its units, as often as the order needs and the record does not know."""

    def __init__(self, units: Removable, choosing: Choosing, looking: Looking, record: ShapeRecord) -> None:
        self._units, self._choosing, self._looking, self._record = units, choosing, looking, record
        self._num_told = 0

    def losses(self, gone: Dropped, candidates: Sequence[int]) -> list[float]:
        """Return the perplexity without the units that are gone and each of the candidates."""
        known = [unit for unit in candidates if self._name(gone | {unit}) in self._record.measured]
        for unit in known:
            self._tell(gone | {unit})
        if unknown := [unit for unit in candidates if unit not in known]:
            left = self._units.without(gone) if gone else self._looking.dense
            self._looking.at(
                left, lambda skeleton, memory: self._measure(gone, unknown, skeleton, memory), self._choosing
            )
        return [self._record.measured[self._name(gone | {unit})][0] for unit in candidates]

    def _measure(self, gone: Dropped, candidates: Sequence[int], left: Skeleton, memory: Memory) -> None:
        """Measure the model that is left once more for each of the candidates, which it does without."""
        looking, unit_at = self._looking, {self._units.place(unit, gone): unit for unit in candidates}

        def without(place: int) -> Skeleton:
            return self._units.without(gone | {unit_at[place]})

        def found(place: int, perplexity: float) -> None:
            self._record.measure(self._name(gone | {unit_at[place]}), lambda: [perplexity])
            self._tell(gone | {unit_at[place]})

        with memory.phase("choose"):
            evaluate_without_each(
                left, list(unit_at), without, looking.tokens_NT, found, batch=looking.config.compute.batch,
                between_blocks=lambda: looking.stop_if_asked(self._units.sought), memory=memory,
            )  # fmt: skip

    def _tell(self, gone: Dropped) -> None:
        (perplexity,) = self._record.measured[self._name(gone)]
        units = ", ".join(map(str, sorted(gone)))
        self._looking.progress.advance(self._num_told, f"{self._units.told} {units}: {perplexity:.3f}")
        self._num_told += 1

    def _name(self, gone: Dropped) -> str:
        return self._units.named + listed(gone)
