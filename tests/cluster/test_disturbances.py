"""Whatever dies, and whenever: a job ends with every block committed once, and none pruned after its commit."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import Entered, Event
from cluster.topology import Handoff, Topology
from pipeline.errors import RunStopped
from tests.cluster.fake_job import FakeJob, make_job, make_topology
from tests.cluster.fake_ledger import MemoryLedger
from tests.cluster.fake_runtime import FakeRuntime

HANDOFFS: tuple[Handoff, ...] = ("pruned", "dense")

quick = settings(deadline=None, max_examples=100, derandomize=True)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    return make_topology(sizes, draw(st.integers(1, 3)), draw(st.sampled_from(HANDOFFS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A topology, the nodes it runs on, and what happens there: when, and to whom."""

    topology: Topology
    nodes: list[int]
    seed: int
    kills: list[tuple[float, int]]
    outages: list[tuple[float, int, float]]

    def inflict(self, runtime: FakeRuntime) -> None:
        """Plan all that is to happen."""
        for at, stage in self.kills:
            runtime.plan(at, partial(runtime.kill, stage))
        for at, node, seconds in self.outages:
            runtime.plan(at, partial(runtime.take_node, node))
            runtime.plan(at + seconds, partial(runtime.add_node, node, self.nodes[node]))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any number of nodes, with room for one stage at least."""
    topology = draw(topologies())
    nodes = draw(st.lists(st.integers(0, topology.replicas * topology.num_stages), min_size=1, max_size=3))
    nodes[0] += topology.replicas
    times = st.floats(0, 100)
    return World(
        topology=topology,
        nodes=nodes,
        seed=draw(st.integers(0, 1000)),
        kills=draw(st.lists(st.tuples(times, st.integers(0, topology.num_stages - 1)), max_size=6)),
        outages=draw(
            st.lists(st.tuples(times, st.integers(0, len(nodes) - 1), st.floats(1, 200)), max_size=2)
        ),
    )  # fmt: skip


def run(job: FakeJob, stop_asked: Callable[[], bool] = lambda: False) -> None:
    job.coordinator.run_to_end(stop_asked)
    job.check_the_end()


@quick
@given(worlds())
def test_a_job_ends_whatever_dies_and_whatever_room_there_is(world: World) -> None:
    job = make_job(world.topology, MemoryLedger(), nodes=world.nodes, seed=world.seed)
    world.inflict(job.runtime)
    run(job)
    job.check_recoveries()


@quick
@given(worlds(), st.lists(st.integers(0, 60), max_size=4))
def test_a_new_coordinator_goes_on_where_one_has_died(world: World, lives: list[int]) -> None:
    ledger = MemoryLedger()
    for number, num_steps in enumerate(lives):
        job = make_job(world.topology, ledger, nodes=world.nodes, seed=world.seed + number)
        world.inflict(job.runtime)
        job.coordinator.begin()
        if any(job.coordinator.step(1.0) for _ in range(num_steps)):
            break
    run(make_job(world.topology, ledger, nodes=world.nodes, seed=world.seed))


@quick
@given(worlds(), st.lists(st.floats(0, 60), max_size=3))
def test_a_job_stopped_at_any_instant_goes_on_and_no_pruning_at_hand_is_lost(world: World, stops: list[float]) -> None:
    ledger = MemoryLedger()
    for number, instant in enumerate(stops):
        job = make_job(world.topology, ledger, nodes=world.nodes, seed=world.seed + number)
        at_hand: set[int] = set()

        def stop_asked(job: FakeJob = job, instant: float = instant, at_hand: set[int] = at_hand) -> bool:
            if job.runtime.now() < instant:
                at_hand |= {e.block for e in job.runtime.delivered if isinstance(e, Entered) and e.phase == "prune"}
            return job.runtime.now() >= instant

        with suppress(RunStopped):
            run(job, stop_asked)
        assert not job.runtime.workers
        assert at_hand <= ledger.commits.keys()
    run(make_job(world.topology, ledger, nodes=world.nodes, seed=world.seed))


@pytest.mark.parametrize("handoff", HANDOFFS)
@pytest.mark.parametrize("victims", [(0,), (1,), (-1,), (0, 1), (0, -1)])
def test_a_job_ends_wherever_a_stage_and_its_neighbours_die(handoff: Handoff, victims: tuple[int, ...]) -> None:
    """At each event in turn: the stage it is of (0), the next one (1), the one before (-1)."""
    topology = make_topology([2, 1, 2], handoff=handoff)
    undisturbed = make_job(topology, MemoryLedger())
    run(undisturbed)
    num_events = len(undisturbed.runtime.happened)
    assert num_events > 30
    killed = 0
    for instant in range(num_events):

        def kill(runtime: FakeRuntime, event: Event, instant: int = instant) -> None:
            if len(runtime.happened) == instant + 1:
                for victim in victims:
                    runtime.kill(event.stage + victim)

        job = make_job(topology, MemoryLedger(), disturb=kill)
        run(job)
        job.check_recoveries()
        killed += len(job.deaths())
    assert killed >= (num_events if 0 in victims else 5)


@pytest.mark.parametrize("handoff", HANDOFFS)
def test_a_job_ends_though_every_attempt_dies_before_its_second_commit(handoff: Handoff) -> None:
    topology = make_topology([3, 2, 3], handoff=handoff)
    commits: dict[tuple[int, int], int] = {}

    def kill(runtime: FakeRuntime, event: Event) -> None:
        if isinstance(event, Entered) and event.phase == "read":
            key = event.stage, event.attempt
            commits[key] = commits.get(key, 0) + 1
            if commits[key] == 2:
                runtime.kill(event.stage)

    job = make_job(topology, MemoryLedger(), disturb=kill)
    run(job)
    job.check_recoveries()
    assert len(job.deaths()) >= 5
