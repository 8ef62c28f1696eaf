"""Workers, nodes and coordinators that die: whatever and whenever it is, the bytes are those of an undisturbed run."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import parse_config
from pipeline.errors import StageFailed
from tests.bench.handoffs import run_in_stages
from tests.integration.clusters import BESA_DENSE, Listener, alone, carry_out_there, six_blocks, spread
from tests.integration.coordinators import command_over_ray, descendants, log_of, outlive, wait_until
from tests.integration.disturbances import (
    COMMITTED,
    Nodes,
    commits_of,
    many_nodes,
    pruned_after_commit,
    trace_file,
    trace_of,
    under_way,
    workers,
)
from tests.integration.support import carry_out, outcome, untouched

RECIPE = [BESA_DENSE, "sparsegpt"]
"""Both streams must be made again, and kept weights are new ones, rounded to what is stored."""

PRUNED, DENSE = {"stages": 3}, {"stages": 3, "handoff": "dense"}
REPLICATED = {"stages": 2, "replicas": 2}
TOUGH = {"max_restarts": 100, "patience": 3.0}
GO_ON = 75
PHASES = 36
"""What is told of six blocks that nothing disturbs: five phases of each, and its commit."""

Undisturbed = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with many_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("cluster-kill"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, nodes: Nodes) -> Undisturbed:
    """What comes out of a job that was left alone, by its topology; in this process, where that has the same bytes."""
    known: dict[str, dict[str, Any]] = {}

    def find(topology: dict[str, Any]) -> dict[str, Any]:
        settings = alone(source, source.parent / f"undisturbed {topology}", RECIPE)
        if str(topology) not in known:
            if topology is PRUNED:
                carry_out(settings)
            elif topology is DENSE:
                run_in_stages(parse_config(settings, "the test"), 3)
            else:
                nodes.number(2)
                carry_out_there(spread(settings, **topology))
            known[str(topology)] = outcome(Path(settings["output"]))
        return known[str(topology)]

    return find


@pytest.mark.parametrize(("topology", "kills"), [(PRUNED, 4), (DENSE, 3), (REPLICATED, 3)], ids=str)
def test_workers_killed_at_random_instants_leave_the_bytes_of_an_undisturbed_run(
    topology: dict[str, Any], kills: int, source: Path, nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    nodes.number(2)
    expected = undisturbed(topology)
    instants, num_killed, num_runs = random.Random(kills), 0, 0
    while num_killed < kills:
        settings = spread(alone(source, tmp_path / str(num_runs), RECIPE), **topology, **TOUGH)
        with under_way(settings) as job:
            for phase in sorted(instants.sample(range(PHASES), kills - num_killed)):
                if job.comes_to(phase):
                    time.sleep(instants.uniform(0, 0.2))
                    num_killed += job.kill_one(instants)
        assert outcome(job.run_directory) == expected
        job.check()
        num_runs += 1


@pytest.mark.parametrize(
    ("topology", "at_first", "at_last", "gently"),
    [(PRUNED, 3, 2, False), (DENSE, 2, 2, True), (DENSE, 2, 1, False), (PRUNED, 2, 1, True)],
    ids=["others take over", "a new one takes over", "the job shrinks", "the job shrinks in turn"],
)
def test_a_node_lost_leaves_the_bytes_of_an_undisturbed_run(
    topology: dict[str, Any],
    at_first: int,
    at_last: int,
    gently: bool,
    source: Path,
    nodes: Nodes,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    """Three stages, and two places on each node: on the last one alone stages take turns."""
    expected = undisturbed(topology)
    instants, lost, num_runs = random.Random(at_first), False, 0
    while not lost:
        nodes.number(at_first)
        settings = spread(alone(source, tmp_path / str(num_runs), RECIPE), **topology, **TOUGH)
        with under_way(settings) as job:
            if job.comes_to(instants.randrange(PHASES)):
                lost = job.lose_a_node(nodes, instants, gently)
                nodes.number(at_last)
        assert outcome(job.run_directory) == expected
        job.check()
        num_runs += 1


def test_a_stage_that_keeps_dying_ends_the_job_which_can_go_on(
    source: Path, nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    nodes.number(2)
    settings = spread(alone(source, tmp_path, RECIPE), **PRUNED, max_restarts=1)
    said = (
        r"(?s)^stages? [0-2].* died 2 times without a new commit in between \(at most 1 restarts\); "
        r"the last time of this:\nstage [0-2] replica 0.*: .*"
        rf"\n\d of 6 blocks are committed in {tmp_path}. Go on with: secateur run {tmp_path}$"
    )
    with pytest.raises(StageFailed, match=said):
        kill_whoever_comes(settings)
    carry_out_there(settings)
    assert outcome(tmp_path) == undisturbed(PRUNED)


def kill_whoever_comes(settings: dict[str, Any]) -> None:
    """Run a job whose workers are killed as they appear."""
    with under_way(settings) as job:
        while job.kill_one(random.Random(0)):
            pass


def test_numbers_that_are_none_end_the_job_in_one_message(source: Path, nodes: Nodes, tmp_path: Path) -> None:
    nodes.number(2)
    spoilt = spoil(source, tmp_path / "source", "model.layers.4.mlp.up_proj.weight")
    settings = spread(alone(source, tmp_path / "run", RECIPE), **REPLICATED) | {"model": str(spoilt)}
    said = (
        r"^stage 1 replicas 0-1: model.layers.4.mlp.up_proj.weight holds 1 NaN or Inf of 1536 numbers .*\n"
        r"Another attempt would end the same way.\n4 of 6 blocks are committed in [^\n]*$"
    )
    with pytest.raises(StageFailed, match=said):
        carry_out_there(settings)
    with untouched(tmp_path / "run" / "model"), pytest.raises(StageFailed, match=said):
        carry_out_there(settings)


class Vandal(Listener):
    """Cuts a file short once the coordinator has opened it, and before workers do."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file, self._content = file, file.read_bytes()

    def begin(self, task: str, total: int, done: int) -> None:
        self._file.write_bytes(self._content[:-100])

    def repent(self) -> None:
        self._file.write_bytes(self._content)


def test_a_source_cut_short_ends_the_job_which_goes_on_once_it_is_whole(
    source: Path, nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    nodes.number(2)
    shutil.copytree(source, tmp_path / "source")
    settings = spread(alone(source, tmp_path / "run", RECIPE), **PRUNED) | {"model": str(tmp_path / "source")}
    vandal = Vandal(tmp_path / "source" / "model-00004-of-00006.safetensors")
    said = (
        r"^stage \d replica 0.*: \S*/model-00004-of-00006.safetensors is not a sound safetensors file: .*\n"
        r"Another attempt would end the same way.\n0 of 6 blocks are committed in [^\n]*$"
    )
    with pytest.raises(StageFailed, match=said):
        carry_out_there(settings, vandal)
    vandal.repent()
    carry_out_there(settings)
    assert outcome(tmp_path / "run") == undisturbed(PRUNED)


def test_a_coordinator_killed_twice_leaves_nothing_running_and_the_bytes_of_an_undisturbed_run(
    source: Path, nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """First with a cluster of its own, then with one that it has joined, and which goes on without it."""
    nodes.number(2)
    instants, num_runs = random.Random(0), 0
    for address in ("local", nodes.cluster.address):
        while True:
            run_directory = tmp_path / str(num_runs)
            settings = spread(alone(source, run_directory, RECIPE), **PRUNED, address=address)
            if kill_coordinator(settings, instants):
                break
            assert outcome(run_directory) == undisturbed(PRUNED)
            num_runs += 1
    before = [(block, COMMITTED) for block in commits_of(run_directory)]
    assert before
    trace_file(run_directory).unlink(missing_ok=True)  # that of one killed after its last commit, while it reported
    with command_over_ray(settings) as child:
        assert child.exit_status() == 0
    assert outcome(run_directory) == undisturbed(PRUNED)
    resumed = trace_of(run_directory) if trace_file(run_directory).exists() else []
    assert pruned_after_commit(before + resumed) == []


def kill_coordinator(settings: dict[str, Any], instants: random.Random) -> bool:
    """Run the command and SIGKILL it some time after a commit; False where it had come to its end before.

    None of the processes that were started for it outlives it: not its workers, and not its cluster.
    """
    run_directory, others = Path(settings["output"]), descendants()
    num_committed = len(commits_of(run_directory))
    with command_over_ray(settings) as child:
        wait_until(lambda: len(commits_of(run_directory)) > num_committed or not child.process.is_alive())
        time.sleep(instants.uniform(0, 0.3))
        started = descendants() - others
        child.process.kill()
        status = child.exit_status()
    assert outlive(started) == []
    assert "Traceback" not in log_of(settings)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_coordinator_told_to_stop_ends_with_75_and_the_job_goes_on(
    source: Path, nodes: Nodes, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    nodes.number(2)
    settings = spread(alone(source, tmp_path / "run", RECIPE), **PRUNED, address=nodes.cluster.address)
    with command_over_ray(settings, {"prune: block 2/6": [signal.SIGTERM]}) as child:
        assert child.exit_status() == GO_ON
    *said, stopped = log_of(settings).splitlines()
    assert any(line.startswith("stopping once this block is committed") for line in said)
    way_on = (
        rf"stopped as asked: \d of 6 blocks are committed in {tmp_path}/run. Go on with: secateur run {tmp_path}/run"
    )
    assert re.fullmatch(way_on, stopped)
    wait_until(lambda: not workers())
    with command_over_ray(settings) as child:
        assert child.exit_status() == 0
    assert outcome(tmp_path / "run") == undisturbed(PRUNED)


def spoil(source: Path, target: Path, name: str) -> Path:
    """A copy of a source in which the first weight of a tensor is not a number."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = torch.nan
            save_file(tensors, file, {"format": "pt"})
            return target
    raise AssertionError(name)
