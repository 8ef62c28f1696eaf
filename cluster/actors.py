"""A worker as a Ray actor: it works in one thread, and in others takes batches, tells events and hears answers."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.util import get_node_ip_address

from cluster.handoff import PROBE, Payload, Sender, Transport, decode
from cluster.messages import Assignment, Committed, Entered, Event, Failure
from cluster.metrics import WorkerMetrics
from cluster.replicas import Group, free_address
from cluster.shelves import Deliver, SentShelf, already_there, own_directory
from cluster.worker import Brief, Worker
from pipeline.devices import choose_device
from pipeline.errors import (
    BudgetExceeded,
    CalibrationError,
    ConfigError,
    MalformedShard,
    NumericsError,
    RunDirectoryError,
    SecateurError,
    UnsupportedCheckpoint,
)
from pipeline.peers import Alone, Peers
from pipeline.shelf import ModelDirectory, Shelf

THREADS = {"receive": 1, "events": 1, "control": 1}
"""Concurrency groups: each has a thread of its own beside the one that works."""

SURELY_AGAIN = (
    BudgetExceeded, CalibrationError, ConfigError, MalformedShard, NumericsError, RunDirectoryError,
    UnsupportedCheckpoint,
)  # fmt: skip
"""Errors that another attempt would end with too; what a disk or a mount has failed of may pass."""

PEER_SECONDS = 1800.0
"""Longest that a replica waits for another one in a sum: stragglers may be slow, the dead are noticed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How a worker is set up where it runs."""

    model_directory: Path | None
    """The run's model directory; None where this node does not see it, and shards are sent."""

    scratch: Path | None
    window: int
    transport: Transport
    threads: int
    num_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Here(Event):
    """A replica has begun."""

    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """A replica has nothing more to do, or has failed."""

    replica: int
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said(Event):
    """A replica has something to tell the user."""

    text: str


class StageActor:
    """One replica of one stage."""

    def __init__(self, brief: Brief, place: Place, depot: ActorHandle[Any] | None) -> None:
        torch.set_num_threads(place.threads)
        self._brief, self._place, self._depot = brief, place, depot
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._untaken: list[Event] = []
        self._num_taken = 0
        self._answers: SimpleQueue[tuple[int, bool]] = SimpleQueue()
        self._metrics = WorkerMetrics(brief.stage, brief.replica)
        self._attempt = 0
        self._sender = Sender(place.window, place.transport, self._metrics, self._say)
        self._worker = Worker(brief, self._note)

    def __repr__(self) -> str:
        """How Ray names this actor in logs."""
        return f"stage {self._brief.stage} replica {self._brief.replica}"

    def address(self) -> str:
        """Return where the replicas of this stage are to meet."""
        return free_address(node_address())

    def run(self, assignment: Assignment, address: str | None) -> None:
        """Work; what comes of it is told by events."""
        self._attempt = assignment.attempt
        stage, attempt, replica = assignment.stage, assignment.attempt, self._brief.replica
        self._events.put(Here(stage=stage, attempt=attempt, replica=replica))
        failure: Failure | None = None
        try:
            self._worker.find_model()
            with self._peers(address) as peers, self._shelf() as (shelf, deliver):
                self._worker.run(assignment, peers, self._sender, shelf, deliver, self._acknowledged)
                if assignment.forward:
                    self._sender.finish()
        except SecateurError as error:
            failure = Failure(replica=replica, message=error.message, fatal=isinstance(error, SURELY_AGAIN))
        except Exception as error:  # whatever it is, the coordinator decides what follows
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            failure = Failure(replica=replica, message=message, fatal=False)
        self._events.put(Ended(stage=stage, attempt=attempt, replica=replica, failure=failure))

    @ray.method(concurrency_group="receive")
    def receive(self, stream: str, start: int, payload: Payload | torch.Tensor) -> None:
        """Take one batch from the stage before."""
        if stream != PROBE:
            self._worker.receive(stream, start, decode(payload))

    @ray.method(concurrency_group="control")
    def connect(self, receiver: ActorHandle[Any] | None) -> None:
        """Hand batches on to this actor from now on; None: to nobody."""
        self._sender.connect(receiver)

    @ray.method(concurrency_group="control")
    def hold(self) -> None:
        """Keep batches until connected."""
        self._sender.hold()

    @ray.method(concurrency_group="control")
    def acknowledge(self, block: int, go_on: bool) -> None:
        """Hear that a commit is durable, and whether to go on."""
        self._answers.put((block, go_on))

    @ray.method(concurrency_group="events")
    def events(self, seconds: float, num_taken: int) -> list[Event]:
        """Return what has happened since the first `num_taken` events, waiting so long for something to happen.

        Events are kept until they are known to have arrived: an answer may be lost on its way.
        """
        del self._untaken[: num_taken - self._num_taken]
        self._num_taken = num_taken
        try:
            self._untaken.append(self._events.get(timeout=0.0 if self._untaken else seconds))
            while True:
                self._untaken.append(self._events.get_nowait())
        except Empty:
            return list(self._untaken)

    def _acknowledged(self, block: int) -> bool:
        while True:
            answered, go_on = self._answers.get()
            if answered == block:
                return go_on

    def _note(self, event: Event) -> None:
        """Pass an event on, and count it."""
        match event:
            case Committed(commit=commit):
                self._metrics.block_done()
                self._metrics.bytes_written(commit.num_bytes)
            case Entered(phase="read", block=block):
                self._metrics.bytes_read(self._brief.block_bytes[block])
            case Entered(phase="collect" | "propagate"):
                self._metrics.tokens(self._brief.tokens_NT.numel())
            case Entered(phase="replay", block=block):
                self._metrics.bytes_read(self._brief.block_bytes[block])
                self._metrics.tokens(self._brief.tokens_NT.numel())
        self._events.put(event)

    def _say(self, text: str) -> None:
        self._events.put(Said(stage=self._brief.stage, attempt=self._attempt, text=text))

    @contextmanager
    def _peers(self, address: str | None) -> Iterator[Peers]:
        if address is None:
            yield Alone()
            return
        device = choose_device(self._brief.settings["compute"]["device"])
        with Group.join(address, self._brief.replica, self._place.num_replicas, device, PEER_SECONDS) as group:
            yield group

    @contextmanager
    def _shelf(self) -> Iterator[tuple[Shelf, Deliver]]:
        if self._place.model_directory is not None:
            yield ModelDirectory(self._place.model_directory), already_there
            return
        depot = self._depot
        assert depot is not None
        with own_directory(self._place.scratch) as directory:
            shelf = SentShelf(directory, reach(depot.write), reach(depot.finish), reach(depot.read))
            yield shelf, shelf.deliver


def node_address() -> str:
    """Return the address of the node this process runs on."""
    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def reach(method: Any) -> Callable[..., Any]:
    """Return a function that calls an actor's method and waits for its result; its own errors come unwrapped."""

    def call(*arguments: Any) -> Any:
        try:
            return ray.get(method.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SecateurError):
                raise error.cause from None
            raise

    return call
