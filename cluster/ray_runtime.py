"""Runs the stages of a job as Ray actors: resources, beginnings, events, ends. Decides nothing.

Each stage has one placement group with a bundle a replica, so that its replicas begin together or not at all. Actors
are never restarted by Ray: a stage that has lost one is ended as a whole, and the coordinator starts it again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import THREADS, Ended, Here, Place, Said, StageActor
from cluster.messages import Assignment, Event, Failed, Failure, Finished, Placed, Received
from cluster.worker import Brief

LONGEST_POLL = 5.0
"""Seconds that an actor waits for an event before it answers that there was none."""

PLACEMENT_POLL = 0.1
"""Seconds between looks whether a stage has got its resources."""

LONGEST_BEGINNING = 600.0
"""Seconds that a worker's process may take to come up: the first one on a node imports from a cold disk."""

GATHERING = 1.0
"""Seconds in which the failures of a stage's replicas are gathered before it is ended and they are told together."""


@dataclass(slots=True)
class _Running:
    """One stage, from its request for resources to its end."""

    assignment: Assignment
    placement: PlacementGroup
    actors: list[ActorHandle[Any]] = field(default_factory=list)
    work: dict[ray.ObjectRef[None], int] = field(default_factory=dict)
    """The end of each replica's work, to come."""

    polls: dict[ray.ObjectRef[list[Event]], int] = field(default_factory=dict)
    """The outstanding question for events of each replica."""

    taken: dict[int, int] = field(default_factory=dict)
    """How many events of each replica have arrived here."""

    placed_at: float = 0.0
    begun: set[int] = field(default_factory=set)
    received: int = 0
    ended: set[int] = field(default_factory=set)
    failures: dict[int, Failure] = field(default_factory=dict)
    failing_since: float = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether all replicas are at work."""
        return bool(self.actors) and len(self.begun) == len(self.actors)


class RayRuntime:
    """The `Runtime` of a real cluster; `ray.init` has been called."""

    def __init__(
        self,
        briefs: Callable[[int], list[Brief]],
        place: Place,
        bundle: Mapping[str, float],
        depot: ActorHandle[Any] | None,
        say: Callable[[str], None],
    ) -> None:
        """`briefs` gives the briefs of a stage's replicas; `bundle` is what each worker takes (CPU, GPU)."""
        self._briefs, self._place, self._bundle, self._depot, self._say = briefs, place, dict(bundle), depot, say
        self._stages: dict[int, _Running] = {}

    def now(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()

    def start(self, assignment: Assignment) -> None:
        """Ask for the resources of a stage; it begins as soon as they are there."""
        assert assignment.stage not in self._stages, f"stage {assignment.stage} is running"
        bundles = [self._bundle] * self._place.num_replicas
        self._stages[assignment.stage] = _Running(assignment, placement_group(bundles, strategy="PACK"))
        self._connect(assignment.stage - 1)

    def release(self, stage: int) -> None:
        """End a stage; the one before it drops what it would send."""
        if stage in self._stages:
            self._end(stage)
        self._connect(stage - 1)

    def acknowledge(self, stage: int, attempt: int, block: int, go_on: bool) -> None:
        """Tell a stage that its commit is durable."""
        running = self._stages.get(stage)
        if running is not None and running.assignment.attempt == attempt and running.actors:
            reliable(running.actors[0].acknowledge).remote(block, go_on)

    def poll(self, seconds: float) -> list[Event]:
        """Return what has happened, waiting at most so long for something to happen."""
        until = time.monotonic() + seconds
        while True:
            events = self._placed() + self._gathered()
            left = 0.0 if events else until - time.monotonic()
            events += self._answered(left)
            if events or time.monotonic() >= until:
                return events

    def _placed(self) -> list[Event]:
        """Begin every stage whose resources are there; one whose resources go before it has begun has failed."""
        events: list[Event] = []
        for stage, running in self._stages.items():
            if running.has_begun or running.failures:
                continue
            state = placement_group_table(running.placement)["state"]
            if state == "CREATED" and not running.actors:
                self._begin(running)
                events.append(Placed(stage=stage, attempt=running.assignment.attempt, nodes=_nodes(running.placement)))
            elif running.actors and state == "RESCHEDULING":
                self._fail(running, Failure(replica=0, message="its node was lost before it had begun", fatal=False))
            elif running.actors and time.monotonic() - running.placed_at > LONGEST_BEGINNING:
                late = f"its process had not begun {LONGEST_BEGINNING:g} s after it had its resources"
                self._fail(running, Failure(replica=0, message=late, fatal=False))
        return events

    def _begin(self, running: _Running) -> None:
        assignment = running.assignment
        running.placed_at = time.monotonic()
        running.actors = [self._make(running, brief) for brief in self._briefs(assignment.stage)]
        address = running.actors[0].address.remote() if len(running.actors) > 1 else None
        self._connect(assignment.stage)
        self._connect(assignment.stage - 1)
        for replica, actor in enumerate(running.actors):
            running.work[actor.run.remote(assignment, address)] = replica
            self._ask(running, replica)

    def _make(self, running: _Running, brief: Brief) -> ActorHandle[Any]:
        strategy = PlacementGroupSchedulingStrategy(running.placement, placement_group_bundle_index=brief.replica)
        direct: dict[str, Any] = {"enable_tensor_transport": True} if self._place.transport == "direct" else {}
        decorate: Any = ray.remote  # its types know nothing of concurrency groups
        worker = decorate(concurrency_groups=THREADS)(StageActor)
        handle: ActorHandle[Any] = worker.options(
            name=f"stage-{brief.stage}-replica-{brief.replica}-attempt-{running.assignment.attempt}",
            num_cpus=self._bundle.get("CPU", 0),
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            max_restarts=0,
            **direct,
        ).remote(brief, self._place, self._depot)
        return handle

    def _connect(self, stage: int) -> None:
        """Tell a stage whom to send to: the next one if it wants a stream, once it has begun; else nobody."""
        sender, receiver = self._stages.get(stage), self._stages.get(stage + 1)
        for replica, actor in enumerate(sender.actors if sender is not None else []):
            if receiver is None or receiver.assignment.input != "stream":
                reliable(actor.connect).remote(None)
            elif receiver.actors:
                reliable(actor.connect).remote(receiver.actors[replica])
            else:
                reliable(actor.hold).remote()

    def _ask(self, running: _Running, replica: int) -> None:
        asked: ray.ObjectRef[list[Event]] = running.actors[replica].events.remote(
            LONGEST_POLL, running.taken.get(replica, 0)
        )
        running.polls[asked] = replica

    def _answered(self, seconds: float) -> list[Event]:
        """Wait for answers to the outstanding questions, take all that have come, and ask again."""
        asked = {ref: running for running in self._stages.values() for ref in (*running.polls, *running.work)}
        placing = any(not running.has_begun for running in self._stages.values())
        failing = any(running.failures for running in self._stages.values())
        seconds = min(seconds, PLACEMENT_POLL) if placing or failing else seconds
        if not asked:
            time.sleep(max(0.0, seconds))
            return []
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=max(0.0, seconds))
        more, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        events: list[Event] = []
        for ref in dict.fromkeys(ready + more):
            events += self._take(asked[ref], ref)
        return events

    def _take(self, running: _Running, ref: Any) -> list[Event]:
        if ref in running.work:
            self._hear_end(running, ref)
            return []
        replica = running.polls.pop(ref)
        try:
            told = ray.get(ref)
        except ActorUnavailableError:
            time.sleep(PLACEMENT_POLL)  # out of reach for a moment, or dead: Ray will know
            self._ask(running, replica)
            return []
        except RayActorError as error:
            self._fail(running, Failure(replica=replica, message=_why_dead(error), fatal=False))
            return []
        running.taken[replica] = running.taken.get(replica, 0) + len(told)
        events = [event for one in told for event in self._translate(running, one)]
        if replica not in running.ended:
            self._ask(running, replica)
        return events

    def _hear_end(self, running: _Running, ref: "ray.ObjectRef[None]") -> None:
        """Hear that a replica's work has ended: its events tell how, unless it could not even begin."""
        replica = running.work.pop(ref)
        try:
            ray.get(ref)
        except RayTaskError as error:
            self._fail(running, Failure(replica=replica, message=str(error.cause), fatal=False))
        except RayActorError:
            return  # nobody answers the question for events either

    def _translate(self, running: _Running, event: Event) -> list[Event]:
        """Turn what one replica tells into what the coordinator hears of the stage."""
        stage, attempt, size = running.assignment.stage, running.assignment.attempt, len(running.actors)
        match event:
            case Here(replica=replica):
                running.begun.add(replica)
            case Received():
                running.received += 1
                if running.received == size:
                    return [event]
            case Said(text=text):
                self._say(f"stage {stage}: {text}")
            case Ended(replica=replica, failure=failure):
                running.ended.add(replica)
                if failure is not None:
                    self._fail(running, failure)
                elif len(running.ended) == size and not running.failures:
                    self._end(stage)
                    return [Finished(stage=stage, attempt=attempt)]
            case _:
                return [event]
        return []

    def _fail(self, running: _Running, failure: Failure) -> None:
        running.failing_since = running.failing_since or time.monotonic()
        running.failures[failure.replica] = failure

    def _gathered(self) -> list[Event]:
        """End the stages that have failed, once their replicas' failures are in."""
        events: list[Event] = []
        for stage, running in list(self._stages.items()):
            waited = time.monotonic() - running.failing_since >= GATHERING
            if running.failures and (waited or len(running.failures) == len(running.actors)):
                self._end(stage)
                failures = tuple(running.failures[replica] for replica in sorted(running.failures))
                events.append(Failed(stage=stage, attempt=running.assignment.attempt, failures=failures))
        return events

    def _end(self, stage: int) -> None:
        """Kill the actors of a stage and give its resources back."""
        running = self._stages.pop(stage)
        for actor in running.actors:
            ray.kill(actor)
        remove_placement_group(running.placement)


def reliable(method: Any) -> Any:
    """Return an actor's method that is tried again where the actor is out of reach but not dead; it may run twice."""
    return method.options(max_task_retries=-1)


def _nodes(placement: PlacementGroup) -> tuple[str, ...]:
    """Return the address of each replica's node."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
    where = placement_group_table(placement)["bundles_to_node_id"]
    return tuple(addresses.get(where[bundle], "a node that is gone") for bundle in sorted(where))


def _why_dead(error: RayActorError) -> str:
    """Return the first line of what Ray says about a death that tells its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "cause" in line.lower() or "died" in line.lower() or "exit" in line.lower()]
    # Ray's guesses at common causes fill a screen and fit every death.
    return (telling or lines or ["the worker died"])[-1].partition(" Some common causes")[0]
