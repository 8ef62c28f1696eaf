"""A job on fake stages, run by a real coordinator: set up, disturbed, and looked at afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from cluster.coordinator import Coordinator
from cluster.messages import Entered, Failed, Finished
from cluster.policy import Limits
from cluster.topology import Handoff, Topology
from pipeline.ledger import Ledger
from tests.cluster.fake_ledger import Told
from tests.cluster.fake_runtime import EPOCH, Disturb, FakeRuntime

TOUGH = Limits(max_restarts=1000, patience=20.0, give_up_after=5000.0)
"""For jobs that must come to their end, whatever happens to them."""


def make_topology(sizes: Sequence[int], replicas: int = 1, handoff: Handoff = "pruned") -> Topology:
    """Stages of so many blocks each."""
    stages = tuple(range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0)))
    return Topology(stages=stages, replicas=replicas, handoff=handoff)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeJob:
    """One coordinator and everything it talks to."""

    coordinator: Coordinator
    runtime: FakeRuntime
    ledger: Ledger
    told: Told

    def check_the_end(self) -> None:
        """Everything is committed, told once, and nothing is left behind."""
        num_blocks = self.runtime.topology.num_blocks
        assert sorted(self.ledger.commits) == list(range(num_blocks))
        advanced = [call[1] for call in self.told.calls if call[0] == "advance"]
        assert len(advanced) == len(set(advanced))
        assert not self.runtime.workers, "somebody still runs"
        # A stage that has died can have lost one block's pruning; nothing else is ever pruned twice.
        pruned = [event.block for event in self.entered("prune")]
        assert len(pruned) - len(set(pruned)) <= len(self.deaths())

    def deaths(self) -> list[Failed]:
        return [event for event in self.runtime.happened if isinstance(event, Failed)]

    def entered(self, phase: str) -> list[Entered]:
        """Who entered a phase, replica 0 for all of a stage."""
        events = [event for event in self.runtime.happened if isinstance(event, Entered)]
        return [event for event in events if event.phase == phase and event.replica == 0]

    def check_recoveries(self) -> None:
        """Each death that was told of is in the ledger, with what was done again because of it.

        One of a stage that had just finished is of no interest.
        """
        finished = {(e.stage, e.attempt) for e in self.runtime.delivered if isinstance(e, Finished)}
        notes = [note for name, note in self.ledger.notes.items() if name.startswith("recovery.")]
        causes = "\n".join(note["cause"] for note in notes)
        for event in self.runtime.delivered:
            if isinstance(event, Failed) and (event.stage, event.attempt) not in finished:
                assert f"stage {event.stage} replica" in causes
                assert event.failures[0].message in causes
        assert [note for note in notes if not note["redone"]] == []


def make_job(
    topology: Topology, ledger: Ledger, *, nodes: Sequence[int] = (100,), seed: int = 0, limits: Limits = TOUGH,
    disturb: Disturb = lambda runtime, event: None, delays: Sequence[float] = (0.0, 0.0, 0.3, 1.7),
) -> FakeJob:  # fmt: skip
    runtime = FakeRuntime(topology, ledger.commits, nodes=list(nodes), seed=seed, disturb=disturb, delays=delays)
    told = Told()
    coordinator = Coordinator(
        topology=topology, ledger=ledger, runtime=runtime, progress=told, run_directory=Path("runs/x"), limits=limits,
        epoch=lambda: EPOCH + runtime.now(),
    )  # fmt: skip
    return FakeJob(coordinator=coordinator, runtime=runtime, ledger=ledger, told=told)
