"""What one worker does: one replica of one stage, from its input to its last block. Whatever carries it is not known.

input      arrives batch by batch from the stage before, or is rebuilt: embedding, then all blocks before its own
dense      (handoff `dense`) the stage's dense blocks run on its input, for the stages that follow
blocks     committed ones are replayed, the others pruned; each commit waits until it is acknowledged
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from socket import gethostname
from threading import Event as Flag
from time import time
from typing import Any

import torch

from cluster.messages import Assignment, Committed, Entered, Event, Propagated, Received
from pipeline.activations import ArrivingBoundary, Boundary, Outlet
from pipeline.allocation import Allocation
from pipeline.checkpoint import Checkpoint
from pipeline.cluster_config import Handoff
from pipeline.config import parse_config
from pipeline.devices import choose_device, choose_dtype
from pipeline.errors import CheckpointError, RunStopped
from pipeline.inputs import embed_tokens, pass_dense_stream, run_dense_blocks
from pipeline.job import model_directory_of, order_of
from pipeline.memory import Memory, fitted_memory
from pipeline.meter import Stopwatch
from pipeline.narrower import narrowed
from pipeline.paging.spool import spool_directory, worker_spool
from pipeline.peers import Peers
from pipeline.progress import Silent
from pipeline.records import Commit
from pipeline.shape import Shape
from pipeline.shelf import Shelf
from pipeline.skeleton import Skeleton
from pipeline.stage import run_stage
from pipeline.stream import Stream
from pipeline.stream_names import StreamName
from pipeline.transaction import Streams, Transaction

Report = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """What a worker is made with."""

    settings: Mapping[str, Any]
    """The run's configuration as plain data."""

    allocation: Allocation
    """How much each block of the model is to lose."""

    handoff: Handoff
    source: str
    """Fingerprint of the model to prune."""

    block_bytes: tuple[int, ...]
    """Weights of each block, as stored."""

    shape: Shape | None = None
    """Which blocks of that model are left, where some are dropped; stages count those alone."""

    stage: int
    replica: int
    tokens_NT: torch.Tensor
    """The calibration sequences of this replica."""


class Worker:
    """One replica of one stage."""

    def __init__(self, brief: Brief, report: Report) -> None:
        self._brief, self._report = brief, report
        self._config = parse_config(dict(brief.settings), "the job's settings")
        self._order = order_of(self._config, brief.allocation, brief.shape)
        self._memory: Memory
        self._arriving: dict[StreamName, ArrivingBoundary] = {}
        self._ready_to_receive = Flag()
        self._assignment: Assignment

    def find_model(self) -> None:
        """Fetch the model where this node does not have it yet."""
        model_directory_of(self._config)

    def receive(self, stream: str, start: int, hidden_BTD: torch.Tensor) -> None:
        """Take a batch that begins at sequence `start` from the stage before; ignores what it does not wait for."""
        self._ready_to_receive.wait()
        boundary = next((b for name, b in self._arriving.items() if name == stream), None)
        if boundary is None or boundary.complete:
            return
        boundary.put(slice(start, start + len(hidden_BTD)), hidden_BTD)
        if all(b.complete for b in self._arriving.values()):
            self._report(Received(stage=self._assignment.stage, attempt=self._assignment.attempt))

    def run(
        self,
        assignment: Assignment,
        peers: Peers,
        outlet: Outlet,
        shelf: Shelf,
        deliver: Callable[[Commit], None],
        acknowledged: Callable[[int], bool],
    ) -> None:
        """Do what is assigned; returns when it is done or was told to stop after a commit.

        `deliver` brings a written shard to where the coordinator wants it; `acknowledged` waits until the coordinator
        has made a commit durable, and says whether to go on.
        """
        self._assignment = assignment
        progress = PhaseReporter(assignment, self._brief.replica, self._report)
        with closing(Checkpoint.open(model_directory_of(self._config))) as checkpoint:
            if checkpoint.fingerprint() != self._brief.source:
                raise CheckpointError(
                    f"{checkpoint.directory} on {gethostname()} is another model than the coordinator's: config.json "
                    "or a shard's header differs; every node needs the same files, or a hub revision that is a commit"
                )
            device = choose_device(self._config.compute.device)
            dtype = choose_dtype(self._config.compute.dtype, device, checkpoint.matrix_dtype())
            skeleton = Skeleton(checkpoint, device, dtype)
            if self._brief.shape is not None:
                skeleton = narrowed(skeleton, self._brief.shape)
            book = EventBook(assignment, peers, device, self._report, deliver, acknowledged)
            spool = worker_spool(
                spool_directory(self._config.memory.spool, self._config.output), self._brief.stage, self._brief.replica
            )
            num_sequences = len(self._brief.tokens_NT)
            with fitted_memory(self._config, skeleton, num_sequences, spool) as self._memory, suppress(RunStopped):
                self._run_stage(skeleton, outlet, shelf, progress, peers, book)

    def _run_stage(
        self,
        skeleton: Skeleton,
        outlet: Outlet,
        shelf: Shelf,
        progress: "PhaseReporter",
        peers: Peers,
        book: "EventBook",
    ) -> None:
        """Bring the input to where the stage begins, and work through its blocks."""
        assignment, dense_handoff = self._assignment, self._brief.handoff == "dense"
        with ExitStack() as held:
            boundary = held.enter_context(self._input(skeleton))
            if dense_handoff:
                self._bring_dense(skeleton, boundary, outlet, progress)
            streams = self._streams(boundary)
            if streams.dense is not None:
                held.enter_context(streams.dense)
            transaction = Transaction(skeleton, self._order, streams, shelf, progress, peers, self._memory)
            held.enter_context(transaction)
            if not dense_handoff and assignment.input == "rebuild":
                for block in range(assignment.start):
                    transaction.replay(block, assignment.committed[block])
            onward = outlet if assignment.forward and not dense_handoff else None
            run_stage(transaction, range(assignment.start, assignment.stop), assignment.committed, book, onward)

    def _input(self, skeleton: Skeleton) -> Boundary:
        """Return the boundary that arrives, or boundary 0; from here on batches are taken, or ignored."""
        tokens_NT = self._brief.tokens_NT
        try:
            if self._assignment.input == "rebuild":
                return embed_tokens(skeleton, tokens_NT, self._order.batch, self._memory.store, "pruned")
            shape = (len(tokens_NT), tokens_NT.shape[1], Stream(skeleton, skeleton.checkpoint).num_features)
            names: list[StreamName] = ["dense"] if self._brief.handoff == "dense" else ["pruned"]
            if self._brief.handoff == "pruned" and self._order.recipe.needs_dense_stream:
                names.append("dense")
            self._arriving = {name: self._memory.store.arriving(name, shape, skeleton.dtype) for name in names}
            return self._arriving[names[0]]
        finally:
            self._ready_to_receive.set()

    def _streams(self, boundary: Boundary) -> Streams:
        dense: Boundary | None = None
        if self._order.recipe.needs_dense_stream:
            arriving = self._arriving.get("dense")
            dense = self._memory.store.copy("dense", boundary) if arriving is None or arriving is boundary else arriving
        return Streams(pruned=boundary, dense=dense)

    def _bring_dense(self, skeleton: Skeleton, boundary: Boundary, outlet: Outlet, progress: "PhaseReporter") -> None:
        """Advance the dense stream to this stage where it did not arrive, and past it where the next one waits."""
        start, stop = self._assignment.start, self._assignment.stop
        if self._assignment.input == "rebuild" and start > 0:
            progress.phase(start, "rebuild")
            run_dense_blocks(skeleton, boundary, range(start), self._order.batch, self._memory)
        progress.phase(start, "dense")
        if self._assignment.forward:
            pass_dense_stream(skeleton, boundary, range(start, stop), self._order.batch, outlet, self._memory)
        if isinstance(boundary, ArrivingBoundary):
            boundary.wait()


class PhaseReporter(Silent):
    """Reports each phase that a worker enters."""

    def __init__(self, assignment: Assignment, replica: int, report: Report) -> None:
        self._assignment, self._replica, self._report = assignment, replica, report

    def phase(self, block: int, name: str) -> None:
        """Report the phase and the time."""
        stage, attempt = self._assignment.stage, self._assignment.attempt
        self._report(Entered(stage=stage, attempt=attempt, replica=self._replica, block=block, phase=name, at=time()))


@dataclass(frozen=True, slots=True)
class EventBook:
    """Books what a worker has done by reporting it; only the first replica does, and the others wait for it."""

    assignment: Assignment
    peers: Peers
    device: torch.device
    report: Report
    deliver: Callable[[Commit], None]
    acknowledged: Callable[[int], bool]

    def replayed(self, block: int) -> None:
        """Say nothing: entering the next phase says it."""

    def commit(self, commit: Commit | None) -> None:
        """Report a commit and wait for its acknowledgement; raises RunStopped, on all replicas, where that says stop.

        No replica goes on before: what it handed on of a block that is then lost would not be sent again.
        """
        go_on = torch.ones((), dtype=torch.int64, device=self.device)
        if commit is not None:
            self.deliver(commit)
            self.report(Committed(stage=self.assignment.stage, attempt=self.assignment.attempt, commit=commit))
            go_on.fill_(self.acknowledged(commit.block))
        self.peers.broadcast(go_on, owner=0)
        if not go_on:
            raise RunStopped(f"stage {self.assignment.stage} was told to stop after a block")

    def done(self, block: int, watch: Stopwatch) -> None:
        """Report what propagating took."""
        seconds = watch.seconds.get("propagate")
        if self.peers.rank == 0 and seconds is not None:
            self.report(
                Propagated(stage=self.assignment.stage, attempt=self.assignment.attempt, block=block, seconds=seconds)
            )
