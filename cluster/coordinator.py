"""Runs a job over stages: poll, decide, act. Owns the ledger; knows stages only through a Runtime.

A block is done once its ledger line is written, which happens here, between the stage's Committed and its
acknowledgement. Whatever dies, this process included, the ledger says where to go on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.failures import Recoveries, describe, describe_start, listed
from cluster.messages import Assignment, Committed, Entered, Event, Failed, Failure, Finished, Propagated, Runtime
from cluster.policy import Decision, Evict, GiveUp, Limits, MarkDone, Start, Stop, Withdraw, decide
from cluster.state import JobState, first_state, is_current, marked_done, released, started, take, tick
from cluster.topology import Topology
from cluster.trace import Span, Trace
from pipeline.errors import RunStopped, StageFailed
from pipeline.human import human_seconds
from pipeline.ledger import Ledger
from pipeline.progress import Progress, StopAsked
from pipeline.records import Commit

POLL_SECONDS = 1.0
"""Longest wait for an event: pauses and patience end, and a stop is noticed, as late as this."""

GATHER_SECONDS = 0.5
"""How long to wait for more deaths before telling of one: those of a lost node come one after the other."""


class Coordinator:
    """Brings a job from what the ledger holds to its end."""

    def __init__(
        self,
        *,
        topology: Topology,
        ledger: Ledger,
        runtime: Runtime,
        progress: Progress,
        run_directory: Path,
        limits: Limits,
        epoch: Callable[[], float] = time.time,
    ) -> None:
        self.state: JobState = first_state(topology, frozenset(ledger.commits), runtime.now())
        self._ledger, self._runtime, self._progress = ledger, runtime, progress
        self._run_directory, self._limits, self._epoch = run_directory, limits, epoch
        self._recoveries = Recoveries(ledger, progress)
        self._untold: dict[int, tuple[Failure, ...]] = {}
        self._died_at = 0.0
        self._trace = Trace()

    @property
    def spans(self) -> list[Span]:
        """What each replica has done until now, and when."""
        return self._trace.spans

    def run_to_end(self, stop_asked: StopAsked) -> None:
        """Prune all blocks; no stage is left running, however this ends.

        Raises RunStopped once a stop was asked for and the blocks at hand are committed, StageFailed when going
        on makes no sense, and StorageError where the ledger cannot be written.
        """
        if len(self.state.committed) == self.state.topology.num_blocks:
            return
        self.begin()
        try:
            done = self.step(0.0)
            while not done:
                if stop_asked():
                    self.ask_stop()
                done = self.step(POLL_SECONDS)
        finally:
            self.release_all()
        self._progress.end()

    def begin(self) -> None:
        """Tell what there is to do, and, where an earlier run has committed blocks, that this one goes on."""
        num_done, num_blocks = len(self.state.committed), self.state.topology.num_blocks
        if num_done:
            cause = f"{num_done} of {num_blocks} blocks are committed; going on from there"
            self._recoveries.open(range(len(self.state.stages)), cause)
        self._progress.begin("prune", num_blocks, num_done)

    def ask_stop(self) -> None:
        """Let blocks that are being pruned come to their commit, and everything else end."""
        self.state = self.state.stop()

    def step(self, seconds: float) -> bool:
        """Wait at most `seconds` for something to happen, take it in, and do what is to be done; true at the end.

        Raises what `run_to_end` does.
        """
        events = self._runtime.poll(seconds)
        now = self._runtime.now()
        for event in events:
            if is_current(self.state, event):
                self._take(event, now)
        self.state = tick(self.state, now)
        decisions = decide(self.state, now, self._limits)
        if self._untold and (decisions or now >= self._died_at + GATHER_SECONDS):
            self._tell_deaths(decisions)
        while decisions:
            for decision in decisions:
                self._act(decision, now)
            decisions = decide(self.state, now, self._limits)
        return self.state.is_done

    def release_all(self) -> None:
        """End every stage that has resources or has asked for them."""
        for index, stage in enumerate(self.state.stages):
            if stage.is_active:
                self._release(index, self._runtime.now())

    def _take(self, event: Event, now: float) -> None:
        """Take in one event of a present attempt. A commit is durable before anything else is made of it."""
        match event:
            case Committed(commit=commit):
                self._commit(event, commit)
            case Propagated(block=block, seconds=seconds):
                self._ledger.record(f"propagate.{block}", seconds)
            case Entered(replica=replica, block=block, phase=phase):
                self._trace.enter(event)
                if replica == 0:
                    self._progress.phase(block, f"stage {event.stage}: {phase}")
            case Failed(failures=failures):
                self._trace.close(event.stage, self._epoch())
                self._died_at = self._died_at if self._untold else now
                self._untold[event.stage] = failures
            case Finished():
                self._trace.close(event.stage, self._epoch())
        self.state = take(self.state, event, now)

    def _commit(self, event: Event, commit: Commit) -> None:
        """Write the ledger line and tell the stage; a commit that is there already, only tell the stage."""
        if commit.block not in self._ledger.commits:
            self._ledger.commit(commit)
            seconds = human_seconds(sum(commit.seconds.values()))
            self._progress.advance(commit.block, f"stage {event.stage}: error {commit.error:.4f}, {seconds}")
        self._runtime.acknowledge(event.stage, event.attempt, commit.block, not self.state.stopping)

    def _tell_deaths(self, decisions: Sequence[Decision]) -> None:
        """Tell of deaths, all in one; not where the error that ends the job does."""
        if not any(isinstance(decision, GiveUp) for decision in decisions):
            self._recoveries.open(self._untold, describe(self._untold))
        self._untold = {}

    def _act(self, decision: Decision, now: float) -> None:
        match decision:
            case Start():
                self._start(decision, now)
            case Withdraw(stage=stage, why=why) | Evict(stage=stage, why=why):
                self._release(stage, now)
                if not self.state.stopping:
                    self._recoveries.open([stage], f"stage {stage} gives way: {why}")
            case MarkDone(stage=stage):
                self.state = marked_done(self.state, stage)
                blocks = listed("block", self.state.topology.stages[stage])
                self._recoveries.redone(stage, f"stage {stage} has nothing left to do: {blocks} are committed")
            case GiveUp(message=message):
                raise StageFailed(f"{message}\n{self._way_on()}")
            case Stop():
                raise RunStopped(f"stopped as asked: {self._way_on()}")

    def _start(self, decision: Start, now: float) -> None:
        self.state = started(self.state, decision.stage, decision.input, decision.forward, now)
        blocks = self.state.topology.stages[decision.stage]
        assignment = Assignment(
            stage=decision.stage,
            attempt=self.state.stages[decision.stage].attempt,
            start=blocks.start,
            stop=blocks.stop,
            input=decision.input,
            forward=decision.forward,
            committed=self._commits_for(decision, blocks),
        )
        self._runtime.start(assignment)
        self._recoveries.redone(decision.stage, describe_start(assignment))

    def _commits_for(self, decision: Start, blocks: range) -> Mapping[int, Commit]:
        """Return the commits of the blocks that a stage has to read back: with the dense handoff, only its own."""
        rebuilds = decision.input == "rebuild" and self.state.topology.handoff == "pruned"
        wanted = range(0 if rebuilds else blocks.start, blocks.stop)
        return {block: commit for block, commit in self._ledger.commits.items() if block in wanted}

    def _release(self, stage: int, now: float) -> None:
        self._runtime.release(stage)
        self._trace.close(stage, self._epoch())
        self.state = released(self.state, stage, now)

    def _way_on(self) -> str:
        num_done, num_blocks = len(self._ledger.commits), self.state.topology.num_blocks
        return (
            f"{num_done} of {num_blocks} blocks are committed in {self._run_directory}. "
            f"Go on with: secateur run {self._run_directory}"
        )
