"""A model looked at before a run prunes it, in memory that is opened for that under the run's ceilings."""

from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.devices import empty_cache
from pipeline.memory import Memory, opened_memory
from pipeline.meter import resident_bytes
from pipeline.paging.spool import remove_leftovers, spool_directory
from pipeline.planning.choosing import Choosing
from pipeline.planning.plan import fit_for
from pipeline.skeleton import Skeleton

Look = Callable[[Skeleton, Memory], None]


def look_at(
    skeleton: Skeleton, look: Look, *, config: RunConfig, dense: Skeleton, num_sequences: int, choosing: Choosing
) -> None:
    """Have a look at a model that is no larger than the dense one; choosing: all that is looked at in this way.

    Raises BudgetExceeded where it does not fit.
    """
    baseline, batch = resident_bytes(), config.compute.batch
    fit = fit_for(config, dense, num_sequences, baseline, choosing=choosing)
    spool = spool_directory(config.memory.spool, config.output)
    remove_leftovers(spool)
    with opened_memory(config.memory, fit, spool, dense.device, baseline=baseline, batch=batch) as memory:
        look(skeleton, memory)
    empty_cache(dense.device)  # workers may be about to use it
