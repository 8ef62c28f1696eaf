"""Where a run keeps what is large: its budget, the place of its hidden states, and what moves bytes to the disk."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.activations import Boundary, Store, in_memory
from pipeline.budget import Budget, Place
from pipeline.config import RunConfig
from pipeline.memory_config import MemoryConfig
from pipeline.meter import PeakMeter, resident_bytes
from pipeline.paging.engines import open_pager
from pipeline.paging.pager import Pager
from pipeline.paging.spool import Spool, existing
from pipeline.planning.footprint import Fit
from pipeline.planning.plan import fit_for
from pipeline.skeleton import Skeleton
from pipeline.weights import BlockWeights


@dataclass(slots=True)
class Traffic:
    """What pruning has moved past the page cache, or from one memory to another."""

    weights_read: int = 0
    """Bytes of weights that came through the pager."""

    hidden_read: int = 0
    """Bytes of hidden states taken from where they are kept."""

    hidden_written: int = 0
    waited_for_weights: float = 0.0
    """Seconds."""

    waited_for_hidden: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a run's large data is taken from."""

    budget: Budget
    store: Store
    """Makes the boundaries."""

    pager: Pager | None = None
    """Moves weights past the page cache; without one they are read through it."""

    fused: bool = False
    """Whether the next block is collected while one is propagated."""

    ahead: int = 1
    """Blocks whose weights are read ahead."""

    meter: PeakMeter = field(default_factory=lambda: PeakMeter(torch.device("cpu")))
    traffic: Traffic = field(default_factory=Traffic)

    working_sets: Mapping[str, Mapping[Place, int]] = field(default_factory=dict)
    """What each phase holds for as long as it lasts, by its name: statistics, masks, a step's temporaries."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take a phase's working set from the budget, and measure its peaks; raises BudgetExceeded before it begins."""
        with ExitStack() as leases, self.meter.phase(name):
            for place, num_bytes in self.working_sets.get(name, {}).items():
                leases.enter_context(self.budget.take(place, num_bytes, f"what {name} works with"))
            yield

    def count(self, weights: BlockWeights, *boundaries: Boundary | None) -> None:
        """Add what has been moved of weights, and of hidden states, to the run's traffic; once, at their end."""
        self.traffic.weights_read += weights.bytes_read
        self.traffic.waited_for_weights += weights.waited
        for boundary in boundaries:
            if boundary is not None:
                self.traffic.hidden_read += boundary.region.bytes_read
                self.traffic.hidden_written += boundary.region.bytes_written
                self.traffic.waited_for_hidden += boundary.region.waited

    def weights_of(self, skeleton: Skeleton) -> BlockWeights:
        """Return what brings the blocks of a skeleton to where they run; to be closed by the caller."""
        return BlockWeights(skeleton, self.budget, self.pager)


def unlimited() -> Memory:
    """Return memory without ceilings, on the host alone."""
    return Memory(budget=Budget(), store=in_memory())


@contextmanager
def fitted_memory(
    config: RunConfig, skeleton: Skeleton, num_sequences: int, spool_directory: Path, *, surveys: bool = False
) -> Iterator[Memory]:
    """Open what the `memory` section asks for in one process of a cluster job, its ceilings being that process's own.

    `num_sequences`: those it calibrates with; `surveys`: whether it surveys the model. Raises BudgetExceeded where the
    ceilings are too low.
    """
    if config.memory == MemoryConfig():
        yield unlimited()
        return
    baseline, device, batch = resident_bytes(), skeleton.device, config.compute.batch
    fit = fit_for(config, skeleton, num_sequences, baseline, surveys=surveys)
    with opened_memory(config.memory, fit, spool_directory, device, baseline=baseline, batch=batch) as memory:
        yield memory


@contextmanager
def opened_memory(
    config: MemoryConfig, fit: Fit, spool_directory: Path, device: torch.device, *, baseline: int, batch: int
) -> Iterator[Memory]:
    """Open what a plan has chosen, under the ceilings of a configuration; the spool is removed at the end.

    `baseline`: bytes that the process holds already. Raises StorageError where the spool cannot be made.
    """
    choice = fit.choice
    budget = Budget(
        {"device": config.device, "host": config.host, "spool": config.spool_limit},
        baseline=baseline,
        unified=device.type == "cpu",
    )
    with ExitStack() as stack:
        spool: Spool | None = None
        pager: Pager | None = None
        if choice.tier == "disk":
            spool = stack.enter_context(Spool.opened(spool_directory, config.spool_limit))
        if choice.tier == "disk" or config.is_managed:
            pinned = device.type == "cuda"
            pager = stack.enter_context(closing(open_pager(config.io, existing(spool_directory), pinned=pinned)))
        yield Memory(
            budget=budget,
            store=Store(choice.tier, device, budget, spool, pager, batch=batch, depth=choice.depth),
            pager=pager,
            fused=choice.fused,
            ahead=choice.ahead if pager is not None else 1,  # then it is a hint to the kernel, and takes nothing here
            meter=PeakMeter(device),
            working_sets=fit.working_sets,
        )
