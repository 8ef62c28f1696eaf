"""Jobs over a real Ray on this machine, for the integration tests: sessions, a source of six blocks, what came out.

A test file has one session for all its tests:

    from tests.integration.clusters import warm_ray as warm_ray
    pytestmark = pytest.mark.usefixtures("warm_ray")
"""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.cluster_utils import Cluster
from transformers import LlamaConfig

from cluster.handoff import EMPTY_AT_ONCE
from cluster.job import run_on_cluster
from pipeline.config import parse_config
from pipeline.ledger import Ledger
from pipeline.progress import Progress, Silent
from pipeline.report import Report
from pipeline.verify import verify
from tests.cluster.ray_session import PROMPT, QUIET, STORE_BYTES, local_ray, remove
from tests.integration import warm_workers
from tests.integration.processes import ROOT
from tests.integration.support import SILENT, RecipeEntries, job, never, outcome, write_text
from tests.tiny import FAMILIES, GROUPED, save_tiny

NUM_BLOCKS = 6
BESA_DENSE: dict[str, Any] = {"besa": {"target": "dense"}}
"""The dense stream is kept beside the pruned one, and handed on with it."""

COMPUTE = {"threads": 1, "batch": 1}
"""One thread: how a CPU rounds depends on their number. One sequence in a batch: there are as many to hand on."""


class Listener(Silent):
    """Remembers what the user is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Have the workers of every Ray session that begins in the `with` block forked from one warm process."""
    directory = tempfile.mkdtemp(prefix="warm-")  # a short path: see `local_ray`
    Path(directory, "ray").mkdir()  # where Ray notes the address of a cluster
    address = f"{directory}/socket"
    client = f"{sys.executable} -I -S {warm_workers.__file__} {address}"
    with socket.socket(socket.AF_UNIX) as listening, pytest.MonkeyPatch.context() as environment:
        listening.bind(address)
        listening.listen()
        command = [sys.executable, "-m", warm_workers.__name__, "serve", str(listening.fileno())]
        forked = {RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps({"runtime_env": {"py_executable": client}})}
        for name, value in {**QUIET, **forked, "RAY_TMPDIR": directory}.items():
            environment.setenv(name, value)
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[listening.fileno()]):
            listening.close()
            try:
                yield
            finally:
                remove(directory)


@pytest.fixture(scope="module")
def warm_ray() -> Iterator[None]:
    """Ray on this machine, with places for eight workers."""
    with forked_workers(), local_ray(num_cpus=8):
        yield


@contextmanager
def two_nodes(scratch: Path) -> Iterator[tuple[Path, Path]]:
    """A cluster of two nodes with a place for one worker each, and with a temporary directory each, which this gives.

    The driver runs on the first one.
    """
    directory = tempfile.mkdtemp(prefix="ray-")
    roots = scratch / "first", scratch / "second"
    cluster = Cluster()
    with forked_workers():
        try:
            for root in roots:
                root.mkdir(parents=True)
                cluster.add_node(
                    num_cpus=1,
                    resources={root.name: 1},
                    object_store_memory=STORE_BYTES,
                    include_dashboard=False,
                    temp_dir=directory,
                    env_vars={"TMPDIR": str(root)},
                    **({"_system_config": {**EMPTY_AT_ONCE, **PROMPT}} if root == roots[0] else {}),
                )
            ray.init(address=cluster.address, log_to_driver=False)
            yield roots
        finally:
            ray.shutdown()
            cluster.shutdown()
            remove(directory)


def six_blocks(base: Path) -> Path:
    """Write a tiny llama of six blocks in bfloat16, with the text that calibrates it; return its directory."""
    write_text(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "six blocks", LlamaConfig(**{**GROUPED, "num_hidden_layers": NUM_BLOCKS}))
        save_tiny("six blocks", base / "source", torch.bfloat16)
    return base / "source"


def alone(source: Path, output: Path, recipe: RecipeEntries = ("wanda",), **sections: Any) -> dict[str, Any]:
    """The settings of a job for this process alone, without an evaluation."""
    return job(source, output, recipe, **{"compute": COMPUTE, "evaluate": None, **sections})


def spread(settings: dict[str, Any], output: Path | None = None, **cluster: Any) -> dict[str, Any]:
    """The settings of the same job over a cluster, in another run directory or the same."""
    return {**settings, "output": str(output or settings["output"]), "cluster": cluster}


def carry_out_there(settings: dict[str, Any], progress: Progress = SILENT, stop: Callable[[], bool] = never) -> Report:
    """Run a job over the present cluster, silently and to its end unless told otherwise."""
    return run_on_cluster(parse_config(settings, "the test"), progress, stop)


def pruned_alike(run_directory: Path) -> dict[str, Any]:
    """The outcome of a run, less the one file that says with how many replicas it was made."""
    found = outcome(run_directory)
    del found["files"]["pruning.json"]
    return found


def header_of(run_directory: Path) -> dict[str, Any]:
    """What the ledger says determined the bytes."""
    return Ledger.read(run_directory).header.config


def facts_of(run_directory: Path) -> dict[str, Any]:
    """What the report says of the cluster."""
    facts: dict[str, Any] = json.loads((run_directory / "report" / "cluster.json").read_text())
    return facts


def spans_of(run_directory: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """Start and end of each phase by the report's trace, in microseconds, by stage and by phase and block."""
    events = json.loads((run_directory / "report" / "trace.json").read_text())["traceEvents"]
    return {(e["pid"], e["name"]): (e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"}


def is_verified(run_directory: Path, source: Path) -> bool:
    """Whether the pruned model is whole, and has every linear of all blocks pruned; raises where it is damaged."""
    found = verify(run_directory, source, SILENT)
    return 2 * found.pruned_weights == found.prunable_weights > 0
