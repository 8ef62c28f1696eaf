"""A real Ray on this machine for tests: small, quiet, gone afterwards.

A test file asks for it with

    from tests.cluster.ray_session import ray_cluster as ray_cluster
    pytestmark = pytest.mark.usefixtures("ray_cluster")

Ray's workers import the tests' modules by name, so actor classes may live in the test files.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from cluster.handoff import EMPTY_AT_ONCE

QUIET = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment of the driver, which Ray's own processes and the actors inherit."""

PROMPT = {
    "prestart_worker_first_driver": False,  # no worker before there is an actor for it
    "metrics_report_interval_ms": 500,
}
"""How Ray starts and reports without the waiting that real clusters have no need to avoid."""

STORE_BYTES = 100 * 2**20
"""Of the object store; Ray takes no less than 75 MiB."""


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    """Start Ray with so many CPUs (places for actors, not cores) and end it, and leave no file behind."""
    # Not pytest's tmp_path: the path of a socket in it may be 107 characters long at most.
    directory = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in QUIET.items():
            environment.setenv(name, value)
        try:
            ray.init(
                num_cpus=num_cpus,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=directory,
                _system_config={**EMPTY_AT_ONCE, **PROMPT},
            )
            yield
        finally:
            ray.shutdown()
            remove(directory)


def remove(directory: str) -> None:
    """Remove what Ray has left, as often as its last processes still write there on their way out."""
    deadline = time.monotonic() + 20
    while Path(directory).exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine, for all tests of a file."""
    with local_ray():
        yield
