"""A model looked at before a run prunes it, in memory that is opened for that under the run's ceilings."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from pipeline.config import RunConfig
from pipeline.devices import empty_cache
from pipeline.errors import RunStopped
from pipeline.memory import Memory, opened_memory
from pipeline.meter import resident_bytes
from pipeline.paging.spool import remove_leftovers, spool_directory
from pipeline.planning.choosing import Choosing
from pipeline.planning.plan import fit_for
from pipeline.progress import Progress, StopAsked
from pipeline.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Looking:
    """What is looked at, on which tokens, and who waits for it."""

    config: RunConfig
    dense: Skeleton
    tokens_NT: torch.Tensor
    """The calibration."""

    progress: Progress
    stop_asked: StopAsked

    def at(self, skeleton: Skeleton, look: Callable[[Skeleton, Memory], None], choosing: Choosing) -> None:
        """Have a look at a model that is no larger than the dense one; choosing: all that is looked at in this way.

        Raises BudgetExceeded where it does not fit.
        """
        with self._memory(choosing) as memory:
            look(skeleton, memory)
        empty_cache(self.dense.device)  # workers may be about to use it

    def stop_if_asked(self, sought: str) -> None:
        """Raise RunStopped where somebody wants the run to stop; sought: what was being done."""
        if self.stop_asked():
            raise RunStopped(
                f"stopped as asked while {sought}; what was measured is kept. Go on with: "
                f"secateur run {self.config.output}"
            )

    def _memory(self, choosing: Choosing) -> AbstractContextManager[Memory]:
        config, baseline = self.config, resident_bytes()
        fit = fit_for(config, self.dense, len(self.tokens_NT), baseline, choosing=choosing)
        spool = spool_directory(config.memory.spool, config.output)
        remove_leftovers(spool)
        return opened_memory(
            config.memory, fit, spool, self.dense.device, baseline=baseline, batch=config.compute.batch
        )
