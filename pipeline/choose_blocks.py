"""Which blocks a run drops: by how much each turns the hidden states, or by the model's perplexity without it."""

from collections.abc import Sequence

from pipeline.greedy_search import blocks_of, greedy_order
from pipeline.importance import ImportanceMeter
from pipeline.looking import Looking
from pipeline.memory import Memory
from pipeline.methods.structured.depth import Dropped, ends, one_shot, rescored
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.planning.choosing import choosing_of
from pipeline.shape_record import Figures, ShapeRecord, listed
from pipeline.skeleton import Skeleton
from pipeline.survey import survey


class BlockChoice:
    """Measures a model without some of its blocks, as often as the order needs and the record does not know."""

    def __init__(self, step: ShapeStep, num_dropped: int, looking: Looking, record: ShapeRecord) -> None:
        self._step, self._num_dropped, self._looking, self._record = step, num_dropped, looking, record
        self._units, self._num_blocks = blocks_of(looking.dense), looking.dense.num_blocks
        self._choosing = choosing_of(step, self._num_blocks, num_dropped)

    def order(self) -> list[int]:
        """Return the blocks that go, in the order they are chosen. Raises RunStopped between blocks."""
        protected = ends(self._num_blocks)
        if not self._num_dropped:
            return []
        if self._step.depth == "greedy":
            return greedy_order(self._units, self._num_dropped, self._choosing, self._looking, self._record)
        if self._step.depth == "rescored":
            return rescored(self._importance, self._num_blocks, self._num_dropped, protected)
        return one_shot(self._importance(frozenset()), self._num_dropped, protected)

    def importance(self) -> dict[int, float]:
        """Return what is known of each block beside all others."""
        if self._step.depth == "greedy":
            return self._units.alone(self._record)
        return dict(enumerate(self._record.measured.get("", [])))

    def importance_of(self, kept: Sequence[int]) -> list[float]:
        """Return how much each of the blocks that stay turns the hidden states of the dense model."""
        found = self._importance(frozenset())
        return [found[block] for block in kept]

    def _importance(self, gone: Dropped) -> list[float]:
        """Return the importance of every block of the dense model; of those that are gone it is 0."""
        found = iter(self._record.measure(listed(gone), lambda: self._surveyed(gone)))
        return [0.0 if block in gone else next(found) for block in range(self._num_blocks)]

    def _surveyed(self, gone: Dropped) -> Figures:
        looking, meter = self._looking, ImportanceMeter()
        config = looking.config

        def look(skeleton: Skeleton, memory: Memory) -> None:
            survey(
                skeleton, looking.tokens_NT, [meter], skip=config.prune.skip, batch=config.compute.batch, memory=memory,
                progress=looking.progress, between_blocks=lambda: looking.stop_if_asked(self._units.sought),
            )  # fmt: skip

        looking.at(self._units.without(gone) if gone else looking.dense, look, self._choosing)
        return meter.found
