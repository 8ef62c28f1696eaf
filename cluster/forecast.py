"""What a topology will cost: time, traffic and memory, by simulating its workers batch by batch.

A worker does one thing after the other, each once what it needs is there. A stage that is sent batches works on each
as it arrives, and reads its first weights while it waits:

    pruned   stage 0   read collect prune commit … propagate
             stage 1   read                        collect prune commit …
    dense    stage 0   dense read collect prune commit …
             stage 1     dense read collect prune commit …

`dense` is the pass of the dense stream through all dense blocks of a stage, with the reading of their weights.
Replicas of a stage do the same at the same time: the one with most sequences stands for all. Not counted are the
start of processes, the embedding, evaluation and assembly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from cluster.job_shape import BlockCost, JobShape
from cluster.schedule import Task, schedule
from cluster.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What lies between workers, and between them and the disk."""

    handoff_bytes_per_s: float
    """From one worker to one of the next stage."""

    allreduce_bytes_per_s: float
    """From one replica to the others of its stage."""

    shared_disk: bool = False
    """Whether all workers read and write one disk, one at a time, or each has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A phase of a stage in time, in seconds since the job began; waiting for batches counts as part of it."""

    stage: int
    block: int
    """The stage's first one in the phases `dense` and `rebuild`, which are not of one block."""

    phase: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a job takes on a topology."""

    seconds: float
    seconds_alone: float
    """On one worker."""

    handoff_bytes: int
    """Hidden states from stage to stage, all together."""

    allreduce_bytes: int
    """Statistics, gradients and solved linears from replica to replica, all together."""

    read_bytes: int
    """Weights that all workers read, all together."""

    device_bytes: tuple[int, ...]
    """Peak where blocks run, of one worker, by stage: weights, statistics, temporaries."""

    host_bytes: tuple[int, ...]
    """Hidden states in the host memory of one worker, by stage."""

    stage_spans: tuple[Span, ...]
    """What each stage does when: by stage, and within it in time."""

    @property
    def speed_up(self) -> float:
        """How many times as fast as one worker."""
        return self.seconds_alone / self.seconds

    @property
    def worker_peak_bytes(self) -> tuple[int, ...]:
        """Device and host memory of one worker together, by stage."""
        return tuple(device + host for device, host in zip(self.device_bytes, self.host_bytes, strict=True))


def forecast(job: JobShape, topology: Topology, links: Links, at_once: int | None = None) -> Forecast:
    """Simulate a job.

    Where only `at_once` stages have room, each later one begins when an earlier one has ended. A stage that is not
    there when the one before it hands on makes its own input, by running all blocks before its own.

    Seconds grow with every cost and fall with every bandwidth, unless the disk is shared: who comes first there may
    change, as in any queue.
    """
    simulation = _Simulation(job, topology, links, at_once or topology.num_stages)
    spans = simulation.run()
    return Forecast(
        seconds=max(span.end for span in spans),
        seconds_alone=job.seconds_alone,
        handoff_bytes=simulation.handoff_bytes,
        allreduce_bytes=simulation.allreduce_bytes,
        read_bytes=simulation.read_bytes,
        device_bytes=tuple(simulation.device_bytes(stage) for stage in range(topology.num_stages)),
        host_bytes=(ceil(job.num_boundaries * job.boundary_bytes * simulation.part),) * topology.num_stages,
        stage_spans=spans,
    )


class _Simulation:
    """Lists the tasks of one worker of every stage, counting traffic on the way; then schedules them."""

    def __init__(self, job: JobShape, topology: Topology, links: Links, at_once: int) -> None:
        assert topology.num_blocks == len(job.blocks), (topology, len(job.blocks))
        assert topology.replicas <= job.num_batches, (topology.replicas, job.num_batches)
        self._job, self._topology, self._links, self._at_once = job, topology, links, at_once
        self._tasks: list[Task] = []
        self._labels: list[tuple[int, int, str] | None] = []
        """By task: stage, block and phase; None for what no worker does."""

        self._last: list[int | None] = [None] * topology.num_stages
        """By stage: the last task of its worker."""

        self._num_batches = -(-job.num_batches // topology.replicas)
        self.part = self._num_batches / job.num_batches
        """Share of the calibration that one replica has: the one that has most."""

        self.handoff_bytes = self.allreduce_bytes = self.read_bytes = 0

    def run(self) -> tuple[Span, ...]:
        """Simulate all stages; return their phases."""
        arrivals: list[int] = []
        for stage in range(self._topology.num_stages):
            arrivals = self._add_stage(stage, arrivals)
        return self._spans(schedule(self._tasks))

    def device_bytes(self, stage: int) -> int:
        """Return the peak of pruning the largest block, or of the dense pass where that takes more."""
        weights = [self._job.blocks[block].weight_bytes for block in self._topology.stages[stage]]
        held = sum(weights) if self._passes_dense(stage) and self._holds_all(stage) else 0
        return max(max(weights) + self._job.working_bytes, held) + self._job.activation_bytes

    def _add_stage(self, stage: int, arrivals: list[int]) -> list[int]:
        """Add all that a stage does; what is taken and returned are the batches it gets and those it hands on."""
        blocks, sent = self._topology.stages[stage], list[int]()
        if stage > 0 and not self._is_sent_to(stage):
            self._rebuild(stage, range(blocks.start))
        if self._topology.handoff == "dense":
            sent, arrivals = self._pass_dense(stage, arrivals), []
        for block in blocks:
            cost = self._job.blocks[block]
            self._read(stage, cost, block, "read")
            self._collect(stage, block, arrivals if block == blocks.start else [])
            self._do(stage, block, "prune", self._prune_seconds(cost))
            self._do(stage, block, "commit", cost.commit, on_disk=True)
            if block != blocks[-1]:
                self._do(stage, block, "propagate", cost.propagate * self.part)
            elif self._topology.handoff == "pruned" and self._is_sent_to(stage + 1):
                sent = self._hand_on(stage, block)
        return sent

    def _rebuild(self, stage: int, blocks: range) -> None:
        """Run all blocks before a stage's own, to have the hidden states it was not sent."""
        pruned = self._topology.handoff == "pruned"
        for block in blocks:
            cost = self._job.blocks[block]
            label = (block, "replay") if pruned else (blocks.stop, "rebuild")
            seconds = cost.propagate if pruned else cost.dense_forward
            if pruned and self._job.needs_dense_stream:
                self._read(stage, cost, *label)
                seconds += cost.dense_forward
            self._read(stage, cost, *label)
            self._do(stage, *label, seconds * self.part)

    def _pass_dense(self, stage: int, arrivals: Sequence[int]) -> list[int]:
        """Run the dense blocks over each batch as it comes, or over rounds of batches where each reads all weights.

        Where nobody follows, a stage only waits for its batches.
        """
        blocks, sent = self._topology.stages[stage], list[int]()
        if not self._passes_dense(stage):
            for arrival in arrivals:
                self._do(stage, blocks.start, "dense", 0.0, after=[arrival])
            return sent
        self.handoff_bytes += self._job.boundary_bytes
        holds_all = self._holds_all(stage)
        size = 1 if holds_all else -(-self._num_batches // self._job.dense_rounds)
        seconds = sum(self._job.blocks[block].dense_forward for block in blocks) / self._job.num_batches
        for start in range(0, self._num_batches, size):
            batches = range(start, min(start + size, self._num_batches))
            for block in blocks if start == 0 or not holds_all else ():
                self._read(stage, self._job.blocks[block], blocks.start, "dense")
            came = arrivals[start : batches.stop]
            made = self._do(stage, blocks.start, "dense", seconds * len(batches), after=came)
            sent += [self._send(stage, made) for _ in batches]
        return sent

    def _read(self, stage: int, cost: BlockCost, block: int, phase: str) -> None:
        """Read a block's weights: every replica does, which on one disk takes as many times as long."""
        readers = self._topology.replicas
        self.read_bytes += cost.weight_bytes * readers
        seconds = cost.read * (readers if self._links.shared_disk else 1)
        self._do(stage, block, phase, seconds, on_disk=True)

    def _collect(self, stage: int, block: int, arrivals: Sequence[int]) -> None:
        seconds = self._job.blocks[block].collect
        if not arrivals:
            self._do(stage, block, "collect", seconds * self.part)
        for arrival in arrivals:
            self._do(stage, block, "collect", seconds / self._job.num_batches, after=[arrival])

    def _prune_seconds(self, cost: BlockCost) -> float:
        """Sum the statistics, solve, sum the gradients of every update, pass on what was solved; counts the bytes."""
        replicas, replicated = self._topology.replicas, self._job.replicated
        updates = -(-self._job.num_updates * self._num_batches // self._job.num_batches)
        summed = cost.statistics_bytes + updates * self._job.gradient_bytes
        # Of a ring: a sum passes every replica's link twice, what one replica sends to all passes it once.
        exchanged = (replicas - 1) * (2 * summed + cost.solved_bytes)
        self.allreduce_bytes += exchanged
        solving = cost.prune * (replicated + (1 - replicated) * self.part)
        return solving + exchanged / replicas / self._links.allreduce_bytes_per_s

    def _hand_on(self, stage: int, block: int) -> list[int]:
        """Run the last block of a stage over all batches, sending each as it appears."""
        seconds, sent = self._job.blocks[block].propagate / self._job.num_batches, list[int]()
        num_streams = 2 if self._job.needs_dense_stream else 1
        self.handoff_bytes += num_streams * self._job.boundary_bytes
        for _ in range(self._num_batches):
            sent.append(self._send(stage, self._do(stage, block, "propagate", seconds), num_streams))
        return sent

    def _do(
        self,
        stage: int,
        block: int,
        phase: str,
        seconds: float,
        *,
        after: Sequence[int] = (),
        on_disk: bool = False,
    ) -> int:
        """Add what the worker of a stage does next; return its place."""
        last = self._last[stage]
        if last is None and stage >= self._at_once:
            last = self._last[stage - self._at_once]
        disk = "disk" if on_disk and self._links.shared_disk else None
        needed = tuple(after) if last is None else (*after, last)
        self._last[stage] = self._add(Task(seconds=seconds, after=needed, resource=disk), (stage, block, phase))
        return len(self._tasks) - 1

    def _send(self, stage: int, made: int, num_streams: int = 1) -> int:
        """Add the way of one batch to the next stage; return its place. Batches go one after the other."""
        seconds = num_streams * self._job.boundary_bytes / self._job.num_batches / self._links.handoff_bytes_per_s
        return self._add(Task(seconds=seconds, after=(made,), resource=f"link from {stage}"), None)

    def _add(self, task: Task, label: tuple[int, int, str] | None) -> int:
        self._tasks.append(task)
        self._labels.append(label)
        return len(self._tasks) - 1

    def _is_sent_to(self, stage: int) -> bool:
        """Whether a stage is there when the one before it hands on: first thing (dense), or last thing (pruned)."""
        if not 0 < stage < self._topology.num_stages:
            return False
        return self._at_once > (stage if self._topology.handoff == "dense" else 1)

    def _passes_dense(self, stage: int) -> bool:
        return self._topology.handoff == "dense" and self._is_sent_to(stage + 1)

    def _holds_all(self, stage: int) -> bool:
        weights = sum(self._job.blocks[block].weight_bytes for block in self._topology.stages[stage])
        return self._job.resident_bytes is None or weights <= self._job.resident_bytes

    def _spans(self, times: Sequence[tuple[float, float]]) -> tuple[Span, ...]:
        """Join what a worker does batch by batch into phases."""
        spans: list[Span] = []
        for label, (start, end) in zip(self._labels, times, strict=True):
            if label is None:
                continue
            stage, block, phase = label
            if spans and (spans[-1].stage, spans[-1].block, spans[-1].phase) == label:
                start = spans.pop().start
            spans.append(Span(stage=stage, block=block, phase=phase, start=start, end=end))
        return tuple(spans)
