"""What the coordinator and the stages of a job say to each other: assignments one way, events the other.

Every message names its stage and the attempt it belongs to (a stage that has died and is started again is on its next
attempt), so that a late message of a dead actor is told from a present one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.records import Commit

Input = Literal["stream", "rebuild"]
"""Where a stage's hidden states come from: batch by batch from the stage before it, or made by itself, by embedding
the calibration sequences and running all blocks before its own once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one stage is to do in one attempt; every replica of the stage gets the same."""

    stage: int
    attempt: int
    """1 for the first."""

    start: int
    stop: int
    """The stage owns blocks start … stop - 1."""

    input: Input
    forward: bool
    """Whether the next stage waits for this one's batches."""

    committed: Mapping[int, Commit]
    """Of the ledger: of the stage's own blocks, and to rebuild the pruned stream of all blocks before them too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a stage."""

    stage: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(Event):
    """All replicas have their resources; they begin as soon as their processes are up."""

    nodes: tuple[str, ...]
    """Where, by replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered(Event):
    """A replica has entered a phase of a block; the one before it has ended."""

    replica: int
    block: int
    phase: str
    at: float
    """Seconds since the epoch, by the clock of the replica's node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received(Event):
    """Every replica has all of its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A block's shard is where the coordinator wants it; the stage waits for `Runtime.acknowledge`."""

    commit: Commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Propagated(Event):
    """The pruned block has run over all sequences."""

    block: int
    seconds: float
    """What propagating took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """All blocks are done and all batches handed on, or the stage has stopped as it was told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What one replica has died of."""

    replica: int
    message: str
    fatal: bool
    """Whether trying again would end the same way: an error in the settings, the source or the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The attempt is over: replicas have died, and the runtime has ended the others and freed their resources."""

    failures: tuple[Failure, ...]


class Runtime(Protocol):
    """What runs stages: Ray, or a test's fake. Nothing here waits but `poll`."""

    def start(self, assignment: Assignment) -> None:
        """Ask for resources for all replicas of a stage; once they are there, begin (`Placed`).

        With the input `stream`, the stage before it, where it runs and forwards, is told whom to send to from now on.
        Nobody is to be sent batches, or waited for, who makes its own input.
        """

    def release(self, stage: int) -> None:
        """End a stage's replicas, or withdraw the request for their resources; no event follows.

        The stage before it drops what it would send. A stage that has just died or finished is no error: its last
        events, where they were not polled yet, are dropped.
        """

    def acknowledge(self, stage: int, attempt: int, block: int, go_on: bool) -> None:
        """Tell a stage that its commit is durable, and whether to go on or to stop (`Finished`)."""

    def poll(self, seconds: float) -> list[Event]:
        """Return what has happened, waiting at most so long for something to happen."""

    def now(self) -> float:
        """Return seconds on a clock that never goes back."""
