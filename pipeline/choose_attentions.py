"""Which attentions a run silences: one by one, each time the one without which perplexity rises least.

As 2SSP does it (2501.17771), but for the order of its stages: here attentions are chosen while all neurons are there,
on all calibration tokens, for what a run is to write must be settled before its first block is pruned.
"""

from collections.abc import Sequence

import torch

from pipeline.config import RunConfig
from pipeline.errors import RunStopped
from pipeline.looking import look_at
from pipeline.memory import Memory
from pipeline.methods.structured.depth import Dropped, greedy_by_rounds
from pipeline.narrower import narrowed
from pipeline.planning.choosing import choosing_attentions
from pipeline.progress import Progress, StopAsked
from pipeline.shape import Shape
from pipeline.shape_record import ShapeRecord
from pipeline.skeleton import Skeleton
from pipeline.without_each import evaluate_without_each

_NAMED = "attentions"
"""What their measurements' names begin with in the record."""


def choose_attentions(
    num_silent: int,
    config: RunConfig,
    dense: Skeleton,
    tokens_NT: torch.Tensor,
    record: ShapeRecord,
    progress: Progress,
    stop_asked: StopAsked,
) -> list[int]:
    """Return the blocks whose attention is silenced, in the order they are chosen; what is measured is recorded.

    Raises RunStopped between blocks.
    """
    if num_silent == 0:
        return []
    search = _Search(num_silent, config, dense, tokens_NT, record, progress, stop_asked)
    progress.begin("choose", search.choosing.models, 0)
    found = greedy_by_rounds(search.losses, range(dense.num_blocks), num_silent, frozenset())
    progress.end()
    return found


def perplexity_without_each(record: ShapeRecord) -> dict[int, float]:
    """Return what the perplexity on the calibration tokens is without the attention of each block alone."""
    named = ((name.split(), figures) for name, figures in record.measured.items())
    singly = [(int(parts[1]), figures[0]) for parts, figures in named if len(parts) == 2 and parts[0] == _NAMED]
    return dict(sorted(singly))


class _Search:
    """Measures a model without some of its attentions, as often as the order needs and the record does not know."""

    def __init__(
        self,
        num_silent: int,
        config: RunConfig,
        dense: Skeleton,
        tokens_NT: torch.Tensor,
        record: ShapeRecord,
        progress: Progress,
        stop_asked: StopAsked,
    ) -> None:
        self._config, self._dense, self._tokens_NT = config, dense, tokens_NT
        self._record, self._progress, self._stop_asked = record, progress, stop_asked
        self.choosing = choosing_attentions(dense.num_blocks, num_silent)
        self._num_told = 0

    def losses(self, silent: Dropped, candidates: Sequence[int]) -> list[float]:
        """Return the perplexity on the calibration tokens without those attentions and each of the candidates."""
        names = {block: f"{_NAMED} {_listed(silent | {block})}" for block in candidates}
        unknown = [block for block in candidates if names[block] not in self._record.measured]
        self._tell(silent, [block for block in candidates if block not in unknown])

        def found(block: int, perplexity: float) -> None:
            self._record.keep(names[block], lambda: [perplexity])
            self._tell(silent, [block])

        def look(skeleton: Skeleton, memory: Memory) -> None:
            with memory.phase("choose"):
                evaluate_without_each(
                    skeleton, unknown, lambda block: self._without(silent | {block}), self._tokens_NT, found,
                    batch=self._config.compute.batch, between_blocks=self._stop_if_asked, memory=memory,
                )  # fmt: skip

        if unknown:
            look_at(
                self._without(silent), look, config=self._config, dense=self._dense,
                num_sequences=len(self._tokens_NT), choosing=self.choosing,
            )  # fmt: skip
        return [self._record.measured[name][0] for name in names.values()]

    def _without(self, silent: Dropped) -> Skeleton:
        if not silent:
            return self._dense
        everything = tuple(range(self._dense.num_blocks))
        return narrowed(self._dense, Shape(kept=everything, silent=tuple(sorted(silent))))

    def _tell(self, silent: Dropped, candidates: Sequence[int]) -> None:
        for block in candidates:
            without = silent | {block}
            perplexity = self._record.measured[f"{_NAMED} {_listed(without)}"][0]
            self._progress.advance(self._num_told, f"without the attention of {_listed(without)}: {perplexity:.3f}")
            self._num_told += 1

    def _stop_if_asked(self) -> None:
        if self._stop_asked():
            raise RunStopped(
                "stopped as asked while the attentions to silence were chosen; what was measured is kept. Go on with: "
                f"secateur run {self._config.output}"
            )


def _listed(blocks: Dropped) -> str:
    return " ".join(map(str, sorted(blocks)))
