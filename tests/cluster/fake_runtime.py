"""A Runtime without machines: stages that live, send batches, wait for acknowledgements and die, on a clock of its own.

It is as unkind as a real one may be: requests for places are served in any order, events arrive late, a batch sent to
a stage that has died is lost, and a stage that was released is never sent anything again by the same attempt. What it
is asked to do is checked: a stage that could not get all of its input, or prunes a committed block, is an error here.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from cluster.messages import (
    Assignment,
    Committed,
    Entered,
    Event,
    Failed,
    Failure,
    Finished,
    Placed,
    Propagated,
    Received,
)
from cluster.topology import Topology
from pipeline.records import Commit
from tests.cluster.fake_ledger import make_commit

NUM_BATCHES = 3
HORIZON = 50_000.0
"""Seconds of the fake clock that no job here takes: one that goes on longer hangs."""

EPOCH = 1_000_000.0

Life = Generator[float | Callable[[], bool], None, None]
"""Yields seconds to sleep, or what it waits for."""

Disturb = Callable[["FakeRuntime", Event], None]
"""Called with each event as it happens, before it is on its way."""


@dataclass(eq=False, kw_only=True)
class Worker:
    """All replicas of one stage in one attempt."""

    assignment: Assignment
    nodes: tuple[int, ...] = ()  # by replica; none before there are resources
    life: Life | None = None
    wake: float | Callable[[], bool] = 0.0
    target: "Worker | None" = None  # whom to send to
    connected: bool = True  # until the next stage is released
    num_sent: int = 0
    batches: set[int] = field(default_factory=set)  # received
    answers: dict[int, bool] = field(default_factory=dict)  # acknowledgements, by block
    over: bool = False

    @property
    def blocks(self) -> range:
        return range(self.assignment.start, self.assignment.stop)


class FakeRuntime:
    """Stages on nodes with some slots each; a replica takes one."""

    def __init__(
        self, topology: Topology, commits: Mapping[int, Commit], *, nodes: list[int], seed: int = 0,
        disturb: Disturb = lambda runtime, event: None, delays: Sequence[float] = (0.0, 0.0, 0.3, 1.7),
    ) -> None:  # fmt: skip
        self.topology, self.commits, self.disturb, self.delays = topology, commits, disturb, delays
        self.slots, self.free = list(nodes), list(nodes)
        self.workers: dict[int, Worker] = {}
        self.starts: list[Assignment] = []
        self.happened: list[Event] = []
        self.delivered: list[Event] = []
        self._random = Random(seed)
        self._clock = 0.0
        self._on_the_way: list[tuple[float, Event]] = []
        self._plans: list[tuple[float, Callable[[], None]]] = []

    # What a Runtime does.

    def start(self, assignment: Assignment) -> None:
        index, worker = assignment.stage, Worker(assignment=assignment)
        assert index not in self.workers, f"stage {index} is there already"
        attempts = [before.attempt for before in self.starts if before.stage == index]
        assert assignment.attempt == max(attempts, default=0) + 1
        self.starts.append(assignment)
        self._check_input(assignment)
        self.workers[index] = worker
        after, before = self.workers.get(index + 1), self.workers.get(index - 1)
        if assignment.forward and after is not None and after.assignment.input == "stream":
            worker.target = after
        if assignment.input == "stream" and before is not None and before.assignment.forward and before.connected:
            before.target = worker

    def release(self, stage: int) -> None:
        if stage in self.workers:  # it may have died, or have finished, without anybody having been told yet
            self._end(self.workers[stage])
        self._on_the_way = [(at, event) for at, event in self._on_the_way if event.stage != stage]
        if stage - 1 in self.workers:
            self.workers[stage - 1].connected = False

    def acknowledge(self, stage: int, attempt: int, block: int, go_on: bool) -> None:
        assert block in self.commits, f"block {block} is acknowledged before it is in the ledger"
        worker = self.workers.get(stage)
        if worker is not None and worker.assignment.attempt == attempt:
            worker.answers[block] = go_on

    def poll(self, seconds: float) -> list[Event]:
        until = self._clock + seconds
        assert until < HORIZON, f"the job hangs: {self.workers}"
        while not (due := [event for at, event in self._on_the_way if at <= self._clock]):
            self._live()
            following = self._next_time()
            if following > until:
                self._clock = until
                break
            self._clock = following
        self._on_the_way = [(at, event) for at, event in self._on_the_way if at > self._clock]
        self.delivered += due
        return due

    def now(self) -> float:
        return self._clock

    # What happens to it.

    def plan(self, at: float, action: Callable[[], None]) -> None:
        """Let something happen at a time of the fake clock."""
        self._plans.append((at, action))

    def kill(self, stage: int, message: str = "worker died: killed by signal 9", fatal: bool = False) -> None:
        """End all replicas of a stage, if it has any."""
        worker = self.workers.get(stage)
        if worker is not None and worker.nodes:
            self._die(worker, range(self.topology.replicas), message, fatal)

    def take_node(self, node: int) -> None:
        """A node and everything on it is gone."""
        self.slots[node] = self.free[node] = 0
        for worker in list(self.workers.values()):
            if node in worker.nodes:
                dead = [replica for replica, place in enumerate(worker.nodes) if place == node]
                self._die(worker, dead, f"node {node} was lost", False)

    def add_node(self, node: int, slots: int) -> None:
        """A node comes, or comes back."""
        self.slots[node] = self.free[node] = slots

    # How it lives.

    def _live(self) -> None:
        """Let everything happen that happens at the present time."""
        due = [action for at, action in self._plans if at <= self._clock]
        self._plans = [(at, action) for at, action in self._plans if at > self._clock]
        for action in due:
            action()
        moved = True
        while moved:
            self._place()
            moved = False
            for worker in list(self.workers.values()):
                while not worker.over and worker.life is not None and self._is_due(worker.wake):
                    moved = True
                    wake = next(worker.life, None)
                    if wake is None and not worker.over:
                        self._end(worker)
                    elif wake is not None:
                        worker.wake = self._clock + wake if isinstance(wake, float) else wake

    def _is_due(self, wake: float | Callable[[], bool]) -> bool:
        return wake <= self._clock if isinstance(wake, float) else wake()

    def _next_time(self) -> float:
        sleeping = [worker.wake for worker in self.workers.values() if worker.nodes and isinstance(worker.wake, float)]
        return min([*sleeping, *(at for at, _ in self._on_the_way), *(at for at, _ in self._plans)], default=HORIZON)

    def _place(self) -> None:
        """Give places to those that wait for some, in any order."""
        asking = [worker for worker in self.workers.values() if not worker.nodes]
        self._random.shuffle(asking)
        for worker in asking:
            free = [node for node, count in enumerate(self.free) for _ in range(count)]
            if len(free) >= self.topology.replicas:
                worker.nodes = tuple(self._random.sample(free, self.topology.replicas))
                for node in worker.nodes:
                    self.free[node] -= 1
                worker.life, worker.wake = self._life(worker), self._clock

    def _end(self, worker: Worker) -> None:
        worker.over = True
        for node in worker.nodes:
            self.free[node] = min(self.free[node] + 1, self.slots[node])
        del self.workers[worker.assignment.stage]
        for other in self.workers.values():
            if other.target is worker:
                other.target = None

    def _die(self, worker: Worker, replicas: range | list[int], message: str, fatal: bool) -> None:
        self._end(worker)
        failures = tuple(Failure(replica=replica, message=message, fatal=fatal) for replica in replicas)
        self._happen(Failed(**self._of(worker), failures=failures))

    def _of(self, worker: Worker) -> dict[str, int]:
        return {"stage": worker.assignment.stage, "attempt": worker.assignment.attempt}

    def _happen(self, event: Event) -> None:
        """Send an event on its way, unless it is of somebody who has just died; those of a stage arrive in order."""
        worker = self.workers.get(event.stage)
        if not isinstance(event, Failed) and (worker is None or worker.assignment.attempt != event.attempt):
            return
        self.happened.append(event)
        before = [at for at, other in self._on_the_way if other.stage == event.stage]
        at = max([self._clock + self._random.choice(self.delays), *before])
        self._on_the_way.append((at, event))
        self.disturb(self, event)

    def _check_input(self, assignment: Assignment) -> None:
        """An attempt can get all of its input, as far as anybody can know."""
        own, before = range(assignment.start, assignment.stop), self.workers.get(assignment.stage - 1)
        assert {block for block in own if block in self.commits} == {b for b in assignment.committed if b in own}
        if assignment.input == "rebuild":
            if self.topology.handoff == "pruned":
                assert set(range(assignment.start)) <= assignment.committed.keys(), "a block to rebuild from is missing"
        elif before is not None:
            assert before.assignment.forward, "nobody would send"
            assert before.connected, "nobody would send any more"
            assert before.num_sent == 0, f"{before.num_sent} batches were sent to somebody else"

    def _life(self, worker: Worker) -> Life:
        """What a stage does once it has its resources."""
        self._happen(Placed(**self._of(worker), nodes=tuple(f"node-{node}" for node in worker.nodes)))
        if self.topology.handoff == "dense":
            yield from self._dense_input(worker)
        elif worker.assignment.input == "rebuild":
            yield from self._phase(worker, worker.blocks[0], "rebuild")
            self._happen(Received(**self._of(worker)))
        for block in worker.blocks:
            sends = self.topology.handoff == "pruned" and block == worker.blocks[-1]
            if block in worker.assignment.committed:
                yield from self._phase(worker, block, "replay")
            else:
                yield from self._prune(worker, block)
                if not worker.answers[block]:
                    break
                yield from self._phase(worker, block, "propagate")
            if sends:
                yield from self._send(worker)
            if block not in worker.assignment.committed:
                self._happen(Propagated(**self._of(worker), block=block, seconds=0.5))
        self._happen(Finished(**self._of(worker)))

    def _dense_input(self, worker: Worker) -> Life:
        """The dense stream comes in, from the stage before or made here, and goes on to the next, batch by batch."""
        yield from self._phase(worker, worker.blocks[0], worker.assignment.input)
        if worker.assignment.input == "rebuild":
            worker.batches |= set(range(NUM_BATCHES))
        yield from self._send(worker)
        yield lambda: len(worker.batches) == NUM_BATCHES
        self._happen(Received(**self._of(worker)))

    def _prune(self, worker: Worker, block: int) -> Life:
        yield from self._phase(worker, block, "read")
        yield from self._phase(worker, block, "collect")
        if self.topology.handoff == "pruned" and block == worker.blocks[0] and worker.assignment.input == "stream":
            yield lambda: len(worker.batches) == NUM_BATCHES
            self._happen(Received(**self._of(worker)))
        assert block not in self.commits, f"block {block} is pruned again after its commit"
        yield from self._phase(worker, block, "prune")
        yield from self._phase(worker, block, "commit")
        self._happen(Committed(**self._of(worker), commit=make_commit(block)))
        yield lambda: block in worker.answers

    def _send(self, worker: Worker) -> Life:
        """Send every batch, as soon as it is there; whose receiver is gone drops the rest."""
        for batch in range(NUM_BATCHES):
            if self.topology.handoff == "dense":
                yield partial(worker.batches.__contains__, batch)
            yield self._random.choice([0.1, 1.0])
            receiver = worker.target
            if receiver is None:
                return
            yield partial(self._is_clear, worker, receiver)
            if worker.target is not receiver:
                return
            receiver.batches.add(batch)
            worker.num_sent += 1

    def _is_clear(self, worker: Worker, receiver: Worker) -> bool:
        """Whether it is clear if a batch can be sent: the receiver has begun, or is gone."""
        return bool(receiver.nodes) or worker.target is not receiver

    def _phase(self, worker: Worker, block: int, phase: str) -> Iterator[float]:
        for replica in self._random.sample(range(self.topology.replicas), self.topology.replicas):
            at = EPOCH + self._clock + 0.01 * replica
            self._happen(Entered(**self._of(worker), replica=replica, block=block, phase=phase, at=at))
        yield self._random.choice([0.2, 1.0, 4.0])
