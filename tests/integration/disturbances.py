"""What befalls a job over a real cluster in the tests: workers are killed and nodes taken away while it is under way.

When something happens is counted in phases that the job's stages have entered, with some random time on top: so it
falls into the work, not into the start of processes, however fast this machine is today.
"""

import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.node import Node
from ray._private.state import actors
from ray.cluster_utils import Cluster

from cluster.failures import PREFIX
from cluster.handoff import EMPTY_AT_ONCE
from cluster.state import PRUNING
from pipeline.ledger import LEDGER_NAME, Ledger
from pipeline.records import Commit
from pipeline.report import Report
from tests.cluster.ray_session import PROMPT, QUIET, STORE_BYTES, remove
from tests.integration.clusters import NUM_BLOCKS, Listener, carry_out_there, forked_workers
from tests.integration.processes import PATIENCE, fork_server

COMMITTED = "committed"
WORKERS_A_NODE = 2
ALERT = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""How Ray finds out that a node is gone, sooner than where networks may stumble."""


class Nodes:
    """A cluster whose nodes, but for the first, have places for workers, and come and go; the driver is on the first.

    To be used in the main thread: a node dies with the thread that has added it.
    """

    def __init__(self) -> None:
        self.cluster = Cluster()
        self._add(0, _system_config={**EMPTY_AT_ONCE, **PROMPT, **ALERT})

    def number(self, count: int) -> None:
        """Add or take away nodes with places for workers until there are so many."""
        while len(self.cluster.worker_nodes) > count:
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)))
        while len(self.cluster.worker_nodes) < count:
            self._add(WORKERS_A_NODE)

    def remove(self, node_id: str, gently: bool) -> None:
        """Take a node away, with the processes on it; killed, or told to end."""
        node: Node = next(node for node in self.cluster.worker_nodes if node.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=gently)

    def _add(self, places: int, **head: Any) -> None:
        self.cluster.add_node(
            num_cpus=places,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            **head,
        )


@contextmanager
def many_nodes() -> Iterator[Nodes]:
    """A cluster that the tests' process is the driver of; none of its processes outlives the `with` block."""
    directory = tempfile.mkdtemp(prefix="ray-")
    fork_server()
    ensure_running()  # by itself, so that it is none of the processes that a command has started
    with forked_workers(), pytest.MonkeyPatch.context() as environment:
        for name, value in {**QUIET, "RAY_TMPDIR": directory}.items():
            environment.setenv(name, value)
        nodes = Nodes()
        try:
            ray.init(address=nodes.cluster.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
            remove(directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A worker that is alive, or was."""

    stage: int
    attempt: int
    pid: int
    node_id: str


class Witness(Listener):
    """Remembers in what order blocks have entered phases and were committed."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, str]] = []
        self.changed = threading.Condition()

    def phase(self, block: int, name: str) -> None:
        self._tell(block, name.partition(": ")[2])

    def advance(self, block: int, summary: str) -> None:
        self._tell(block, COMMITTED)

    def _tell(self, block: int, what: str) -> None:
        with self.changed:
            self.told.append((block, what))
            self.changed.notify_all()


class UnderWay:
    """A job that runs over the present cluster in a thread of its own."""

    def __init__(
        self, settings: dict[str, Any], num_blocks: int, thread: ThreadPoolExecutor, stop: threading.Event
    ) -> None:
        self.run_directory = Path(settings["output"])
        self.witness = Witness()
        self._num_blocks, self._num_stages = num_blocks, settings["cluster"]["stages"]
        self._killed: set[Victim] = set()
        self._must_return: set[tuple[int, int]] = set()
        self.outcome: Future[Report] = thread.submit(carry_out_there, settings, self.witness, stop.is_set)
        self.outcome.add_done_callback(lambda _: self._wake())

    def comes_to(self, phase: int) -> bool:
        """Wait until so many phases and commits were told; False where the job has ended before."""
        with self.witness.changed:
            enough = self.witness.changed.wait_for(
                lambda: self.outcome.done() or len(self.witness.told) >= phase, PATIENCE
            )
        assert enough, "the job hangs"
        return not self.outcome.done()

    def kill_one(self, instants: random.Random) -> bool:
        """SIGKILL any of the workers, as soon as there is one; False where the job has ended."""
        while not self.outcome.done():
            for victim in shuffled(self._alive(), instants):
                with suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    self._mourn([victim])
                    return True
            time.sleep(0.01)
        return False

    def lose_a_node(self, nodes: Nodes, instants: random.Random, gently: bool) -> bool:
        """Take away a node on which workers are, as soon as there is one; False where the job has ended."""
        while not self.outcome.done():
            for victim in shuffled(self._alive(), instants)[:1]:
                there = [worker for worker in self._alive() if worker.node_id == victim.node_id]
                if not gently:  # nothing on a machine that is lost outlives it; workers outlive a raylet for a while
                    for worker in there:
                        with suppress(ProcessLookupError):
                            os.kill(worker.pid, signal.SIGKILL)
                nodes.remove(victim.node_id, gently)
                self._mourn(there)
                return True
            time.sleep(0.01)
        return False

    def check(self) -> None:
        """Nothing was pruned after its commit, and every death is told, and kept, with what was done again."""
        assert pruned_after_commit(self.witness.told) == []
        assert pruned_after_commit(trace_of(self.run_directory)) == []
        notes = [note for name, note in Ledger.read(self.run_directory).notes.items() if name.startswith(PREFIX)]
        for note in notes:
            assert note["cause"] in self.witness.said
            assert note["redone"], note
            assert set(note["redone"]) <= set(self.witness.said)
        for stage, attempt in self._must_return:
            again = f"stage {stage} starts again (attempt {attempt + 1}): "
            (note,) = [note for note in notes if any(line.startswith(again) for line in note["redone"])]
            assert re.search(rf"stage {stage} (replica|gives way)", note["cause"]), note

    def _alive(self) -> list[Victim]:
        """The workers that are alive; Ray takes a moment to see that one is not."""
        return [victim for victim in workers() if victim not in self._killed]

    def _mourn(self, victims: list[Victim]) -> None:
        """Note who has died, and which stages must be started again: those whose blocks are not all committed."""
        self._killed |= set(victims)
        left = set(range(self._num_blocks)) - commits_of(self.run_directory).keys()
        unfinished = {block * self._num_stages // self._num_blocks for block in left}
        self._must_return |= {(victim.stage, victim.attempt) for victim in victims if victim.stage in unfinished}

    def _wake(self) -> None:
        with self.witness.changed:
            self.witness.changed.notify_all()


@contextmanager
def under_way(settings: dict[str, Any], num_blocks: int = NUM_BLOCKS) -> Iterator[UnderWay]:
    """Run a job while the `with` block lasts, and then on to its end; raises what the job does."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        job = UnderWay(settings, num_blocks, thread, stop)
        try:
            yield job
            job.outcome.result(PATIENCE)
        finally:
            stop.set()


def workers() -> list[Victim]:
    """The workers that Ray takes for alive, of whatever job."""
    found = []
    for actor in actors().values():
        if actor["State"] == "ALIVE" and actor["Name"].startswith("stage-"):
            _, stage, _, _, _, attempt = actor["Name"].split("-")
            node_id = actor["Address"]["NodeID"]
            found.append(Victim(stage=int(stage), attempt=int(attempt), pid=actor["Pid"], node_id=node_id))
    return found


def commits_of(run_directory: Path) -> dict[int, Commit]:
    """The commits of a run, which may not have begun."""
    return Ledger.read(run_directory).commits if (run_directory / LEDGER_NAME).exists() else {}


def shuffled(victims: list[Victim], instants: random.Random) -> list[Victim]:
    return instants.sample(victims, len(victims))


def trace_file(run_directory: Path) -> Path:
    """Where the report's trace is written, by a run that ran any phase."""
    return run_directory / "report" / "trace.json"


def trace_of(run_directory: Path) -> list[tuple[int, str]]:
    """The phases of the report's trace, each with its block, in the order in which they began."""
    events = json.loads(trace_file(run_directory).read_text())["traceEvents"]
    spans = sorted((event["ts"], event["args"]["block"], event["cat"]) for event in events if event["ph"] == "X")
    return [(block, phase) for _, block, phase in spans]


def pruned_after_commit(told: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """What was done in order to prune a block when it was committed already.

    A block that is propagated or replayed has been committed before that.
    """
    committed: set[int] = set()
    wasted = []
    for block, what in told:
        if what in (COMMITTED, "propagate", "replay"):
            committed.add(block)
        elif what in PRUNING and block in committed:
            wasted.append((block, what))
    return wasted
