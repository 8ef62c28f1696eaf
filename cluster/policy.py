"""What to do next: pure functions from a job's state and the time to decisions, which the coordinator carries out.

Two rules keep a job from hanging, with any number of places. A stage that has a place but can do nothing there gives
it to an earlier one that has looked for a place too long. And a stage that nobody can make room for does not hold up
the one before it, which has batches for it: it is withdrawn, and will make its input itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.failures import describe, listed
from cluster.messages import Input
from cluster.state import JobState
from pipeline.human import human_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long, and how often, to try."""

    max_restarts: int = 3
    """Of one stage, without a new commit in between."""

    longest_pause: float = 30.0
    """Seconds before a restart, at most: 1 before the first, then twice as many each time."""

    patience: float = 60.0
    """Seconds a stage may look for resources before others make room, or it stops holding up the one before it."""

    give_up_after: float = 600.0
    """Seconds in which nothing runs and nothing finds resources."""

    resources: str = ""
    """What one replica asks for, in words: `1 GPU, 4 CPUs`."""

    def __post_init__(self) -> None:
        assert self.max_restarts >= 0, self.max_restarts
        assert min(self.longest_pause, self.patience, self.give_up_after) > 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Begin a stage's next attempt."""

    stage: int
    input: Input
    forward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Take back a stage's request for resources."""

    stage: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """End a stage that is running, and free its resources."""

    stage: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkDone:
    """Nothing is left to do for a stage, which holds no resources."""

    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """End the job with an error."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the job as asked: every stage has ended."""


Decision = Start | Withdraw | Evict | MarkDone | GiveUp | Stop


def decide(job: JobState, now: float, limits: Limits) -> Sequence[Decision]:
    """Return what to do now; carried out, it changes the state, so ask again until there is nothing.

    Decisions of one kind at a time: stages are started only once no place is about to change hands.
    """
    if job.is_done:
        return ()
    reason = _fatal(job) or (None if job.stopping else _hopeless(job, now, limits))
    if reason:
        return [GiveUp(message=reason)]
    if job.stopping:
        return _stop(job)
    changes = _nothing_left(job) or _left_hanging(job, now, limits) or _make_room(job, now, limits)
    return changes or _start(job, now, limits)


def pause(restarts: int, limits: Limits) -> float:
    """Return seconds between a stage's death, the `restarts`-th in a row without progress, and its next start."""
    return min(2.0 ** min(restarts - 1, 30), limits.longest_pause)


def _fatal(job: JobState) -> str | None:
    """Say what happened that would happen again, if anything has."""
    fatal = {i: [failure for failure in stage.died if failure.fatal] for i, stage in enumerate(job.stages)}
    return f"{describe(fatal)}\nAnother attempt would end the same way." if any(fatal.values()) else None


def _hopeless(job: JobState, now: float, limits: Limits) -> str | None:
    """Say why trying on makes no sense, if it does not."""
    worn_out = {
        i: stage
        for i, stage in enumerate(job.stages)
        if stage.died and stage.restarts > limits.max_restarts and job.is_wanted(i)
    }
    if worn_out:
        deaths = max(stage.restarts for stage in worn_out.values())
        return (
            f"{listed('stage', worn_out)} died {deaths} times without a new commit in between (at most "
            f"{limits.max_restarts} restarts); the last time of this:\n"
            + describe({i: stage.died for i, stage in worn_out.items()})
        )
    placing = [i for i, stage in enumerate(job.stages) if stage.status == "placing"]
    if placing and now - job.ran_at >= limits.give_up_after:
        return (
            f"nothing runs, and for {human_seconds(now - job.ran_at)} there was no place for {listed('stage', placing)}"
            f" of {job.topology.num_stages}. A stage asks for {_asked(job, limits)} at once; one stage at a time is "
            "enough: add nodes, or ask for fewer replicas or for less"
        )
    return None


def _asked(job: JobState, limits: Limits) -> str:
    """Return what a stage asks for: `2 replicas of 1 GPU, 4 CPUs`."""
    replicas = f"{job.topology.replicas} replica{'s' if job.topology.replicas > 1 else ''}"
    return f"{replicas} of {limits.resources}" if limits.resources else replicas


def _stop(job: JobState) -> Sequence[Decision]:
    """End what would be done again anyway; let blocks that are being pruned come to their commit."""
    why = "a stop was asked for"
    ending: list[Decision] = []
    for index, stage in enumerate(job.stages):
        if stage.status == "placing":
            ending.append(Withdraw(stage=index, why=why))
        elif stage.status == "running" and not (stage.told_to_stop or _will_commit(job, index)):
            ending.append(Evict(stage=index, why=why))
    if ending or any(stage.is_active for stage in job.stages):
        return ending
    return [Stop()]


def _will_commit(job: JobState, index: int) -> bool:
    """Whether a stage will commit the block at hand even if no other stage goes on."""
    return job.is_pruning(index) and not job.stages[index].awaits


def _nothing_left(job: JobState) -> Sequence[Decision]:
    """A stage with all blocks committed has something left to do only while the next one waits for its output."""
    decisions: list[Decision] = []
    for index, stage in enumerate(job.stages):
        if not job.is_wanted(index):
            if stage.status == "waiting":
                decisions.append(MarkDone(stage=index))
            elif stage.status == "placing":
                decisions.append(Withdraw(stage=index, why="nothing is left for it to do"))
    return decisions


def _left_hanging(job: JobState, now: float, limits: Limits) -> Sequence[Decision]:
    """A stage that still misses batches long after the one before it has ended will not get them: it starts again."""
    decisions: list[Decision] = []
    for index, stage in enumerate(job.stages):
        before = job.stages[index - 1]
        if stage.awaits and before.status == "done" and now - before.ended_at >= limits.patience:
            why = f"stage {index - 1} has finished, and part of its output never came"
            decisions.append((Evict if stage.status == "running" else Withdraw)(stage=index, why=why))
    return decisions


def _make_room(job: JobState, now: float, limits: Limits) -> Sequence[Decision]:
    """Take places from stages that can do nothing there for those that have looked for one too long.

    Where there are none, a stage goes on looking, unless the one before it waits for that.
    """
    idle = [index for index in range(len(job.stages)) if _is_starved(job, index)]
    decisions: list[Decision] = []
    for index, stage in enumerate(job.stages):
        waited = now - stage.placing_since
        if stage.status != "placing" or waited < limits.patience:
            continue
        if idle and idle[-1] > index:
            why = f"stage {index}, which comes before it, found no place for {human_seconds(waited)}"
            decisions.append(Evict(stage=idle.pop(), why=why))
        elif stage.input == "stream" and _has_batches(job, index - 1):
            why = f"it found no place for {human_seconds(waited)}, and stage {index - 1} has batches for it"
            decisions.append(Withdraw(stage=index, why=why))
    return decisions


def _has_batches(job: JobState, index: int) -> bool:
    """Whether a stage may have begun to send, or to wait for somebody to send to."""
    sends = job.topology.handoff == "dense" or job.is_complete(index)
    return sends and job.stages[index].status == "running"


def _is_starved(job: JobState, index: int) -> bool:
    """Whether a running stage waits for one that is not running, directly or through others that wait too."""
    if job.stages[index].status != "running" or not job.stages[index].awaits:
        return False
    return job.stages[index - 1].status != "running" or _is_starved(job, index - 1)


def _start(job: JobState, now: float, limits: Limits) -> Sequence[Decision]:
    """Start what can be. All at once, so that each stage knows whether the next one wants its batches."""
    inputs: dict[int, Input] = {}
    for index, stage in enumerate(job.stages):
        # With the stage before it a stage starts at once: later, it could not be sent batches any more.
        due = index - 1 in inputs or not stage.died or now >= stage.ended_at + pause(stage.restarts, limits)
        source = _choose_input(job, index, index - 1 in inputs)
        if stage.status == "waiting" and due and source is not None:
            inputs[index] = source
    return [
        Start(stage=index, input=source, forward=job.is_needed(index) or inputs.get(index + 1) == "stream")
        for index, source in inputs.items()
    ]


def _choose_input(job: JobState, index: int, together: bool) -> Input | None:
    """Return how a stage can have all of its input, if it can; `together` with the stage before it or not.

    Batches come from the stage before it as long as that cannot have sent any to somebody else. With the pruned
    handoff it sends nothing before its last block is committed; with the dense one it sends first thing.
    """
    if together:
        return "stream"
    if job.topology.handoff == "dense" or job.has_all_before(index):
        return "rebuild"
    before = job.stages[index - 1]  # whose last block is not committed, or all blocks before were
    return "stream" if before.is_active and before.forward else None
