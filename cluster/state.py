"""Where each stage of a job stands, as far as the coordinator knows, and how events and decisions change that.

    waiting ──started──> placing ──Placed──> running ──Finished, all blocks committed──> done
       ^                    │                   │
       └────────────────────┴── Failed, released┘        (and from waiting to done, when nothing is left to do)

Everything here is a value: a change returns a new state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.messages import Committed, Entered, Event, Failed, Failure, Finished, Input, Placed, Received
from cluster.topology import Topology

Status = Literal["waiting", "placing", "running", "done"]

PRUNING = frozenset({"read", "collect", "prune", "commit"})
"""The phases of a block whose work is lost unless it comes to the commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """One stage: first what is true of its present (or last) attempt, then what outlives attempts."""

    status: Status = "waiting"
    attempt: int = 0
    """0 before the first start."""

    input: Input = "rebuild"
    forward: bool = False
    """Whether the next stage is connected to this attempt and may be sent something."""

    received: bool = False
    """Whether all replicas have all of their input."""

    placing_since: float = 0.0
    """When it asked for resources, or when some were last given back that it might have got."""

    phases: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    """By replica: block and phase entered last."""

    told_to_stop: bool = False
    died: tuple[Failure, ...] = ()
    """What the last attempt died of; empty once the stage is started again."""

    ended_at: float = 0.0
    """When the last attempt died or finished."""

    restarts: int = 0
    """Deaths in a row without progress in between."""

    progress: int = -1
    """How far it had come at its last death, as `progress_of` counts."""

    ever_received: bool = False

    @property
    def is_active(self) -> bool:
        """Whether it has resources, or has asked for them."""
        return self.status in ("placing", "running")

    @property
    def awaits(self) -> bool:
        """Whether it still needs batches of the stage before it."""
        return self.is_active and self.input == "stream" and not self.received


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """The whole job."""

    topology: Topology
    stages: tuple[StageState, ...]
    committed: frozenset[int]
    """Blocks in the ledger."""

    stopping: bool = False
    """Whether somebody has asked for a stop."""

    ran_at: float
    """When a stage was last seen running, or the beginning."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.status == "done" for stage in self.stages)

    def is_complete(self, stage: int) -> bool:
        """Whether all blocks of a stage are committed."""
        return self.committed.issuperset(self.topology.stages[stage])

    def has_all_before(self, stage: int) -> bool:
        """Whether all blocks before a stage's own are committed."""
        return self.committed.issuperset(range(self.topology.stages[stage].start))

    def is_needed(self, stage: int) -> bool:
        """Whether the next stage waits for the output of this one."""
        return stage + 1 < len(self.stages) and self.stages[stage + 1].awaits

    def is_wanted(self, stage: int) -> bool:
        """Whether a stage has something left to do: blocks to prune, or output to send."""
        return not self.is_complete(stage) or self.is_needed(stage)

    def is_pruning(self, stage: int) -> bool:
        """Whether a replica works on a block that is not committed yet."""
        entered = self.stages[stage].phases.values()
        return any(phase in PRUNING and block not in self.committed for block, phase in entered)

    def progress_of(self, stage: int) -> int:
        """Return a count that grows as a stage gets further, or, while it waits, those whose output it waits for.

        Received input counts once in the whole job: a stage that dies each time right after it makes no progress.
        """
        blocks = self.topology.stages[stage]
        relevant = range(blocks.stop) if self.topology.handoff == "pruned" else blocks
        return len(self.committed.intersection(relevant)) + self.stages[stage].ever_received

    def stop(self) -> "JobState":
        """Return the job once a stop was asked for."""
        return replace(self, stopping=True)

    def put(self, stage: int, state: StageState) -> "JobState":
        """Return the job with another state of one stage."""
        return replace(self, stages=(*self.stages[:stage], state, *self.stages[stage + 1 :]))


def first_state(topology: Topology, committed: frozenset[int], now: float) -> JobState:
    """Return a job that is about to begin, or to go on after the blocks committed by an earlier run."""
    return JobState(
        topology=topology, stages=tuple(StageState() for _ in topology.stages), committed=committed, ran_at=now
    )


def is_current(job: JobState, event: Event) -> bool:
    """Whether an event belongs to an attempt that is under way, not to one that has ended or was released."""
    stage = job.stages[event.stage]
    return stage.is_active and stage.attempt == event.attempt


def take(job: JobState, event: Event, now: float) -> JobState:
    """Return the job after an event; a late one, of an attempt that is over, changes nothing."""
    if not is_current(job, event):
        return job
    stage = job.stages[event.stage]
    match event:
        case Placed():
            return job.put(event.stage, replace(stage, status="running"))
        case Entered(replica=replica, block=block, phase=phase):
            return job.put(event.stage, replace(stage, phases={**stage.phases, replica: (block, phase)}))
        case Received():
            return job.put(event.stage, replace(stage, received=True, ever_received=True))
        case Committed(commit=commit):
            stopped = job.put(event.stage, replace(stage, told_to_stop=job.stopping))
            return replace(stopped, committed=job.committed | {commit.block})
        case Failed(failures=failures):
            return job.put(event.stage, _after_death(job, event.stage, failures, now))
        case Finished():
            status: Status = "done" if job.is_complete(event.stage) else "waiting"
            return _freed(job.put(event.stage, replace(stage, status=status, ended_at=now)), now)
        case _:
            return job


def tick(job: JobState, now: float) -> JobState:
    """Return the job as it is now: remembers when a stage was last running."""
    return replace(job, ran_at=now) if any(stage.status == "running" for stage in job.stages) else job


def started(job: JobState, index: int, source: Input, forward: bool, now: float) -> JobState:
    """Return the job after a stage's next attempt was started, with its input from `source`."""
    stage = replace(
        job.stages[index],
        status="placing",
        attempt=job.stages[index].attempt + 1,
        input=source,
        forward=forward,
        received=False,
        placing_since=now,
        phases={},
        died=(),
    )
    return job.put(index, stage)


def released(job: JobState, index: int, now: float) -> JobState:
    """Return the job after a stage was released; the stage before it is disconnected by that."""
    stage = job.stages[index]
    job = job.put(index, replace(stage, status="waiting"))
    if index > 0:
        job = job.put(index - 1, replace(job.stages[index - 1], forward=False))
    return _freed(job, now) if stage.status == "running" else job


def marked_done(job: JobState, index: int) -> JobState:
    """Return the job after nothing was found left to do for a stage that holds no resources."""
    return job.put(index, replace(job.stages[index], status="done"))


def _after_death(job: JobState, index: int, failures: tuple[Failure, ...], now: float) -> StageState:
    stage, progress = job.stages[index], job.progress_of(index)
    restarts = stage.restarts + 1 if progress == stage.progress else 1
    return replace(stage, status="waiting", died=failures, ended_at=now, restarts=restarts, progress=progress)


def _freed(job: JobState, now: float) -> JobState:
    """Let every stage that looks for a place look anew: there is one more."""
    stages = (replace(stage, placing_since=now) if stage.status == "placing" else stage for stage in job.stages)
    return replace(job, stages=tuple(stages))
