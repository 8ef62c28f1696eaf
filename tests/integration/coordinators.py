"""The coordinator of a job over a cluster as a process of its own, which may be killed, and what it leaves behind."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from tests.cluster.ray_session import QUIET
from tests.integration.processes import PATIENCE, Child, command

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
NO_SIGNALS: Mapping[str, list[int]] = {}


def command_over_ray(settings: dict[str, Any], signals: Mapping[str, list[int]] = NO_SIGNALS) -> Child:
    """The `secateur run` command in a process of its own; signals are raised as a line is said that begins so."""
    config = Path(settings["output"] + ".yaml")
    config.write_text(yaml.safe_dump(settings))
    environment = {name: os.environ[name] for name in (*QUIET, RAY_JOB_CONFIG_JSON_ENV_VAR, "RAY_TMPDIR")}
    return Child(_command_over_ray, environment, ["run", str(config)], Path(settings["output"] + ".log"), dict(signals))


def log_of(settings: dict[str, Any]) -> str:
    """What the command has said, the last time it was run."""
    return Path(settings["output"] + ".log").read_text()


def descendants() -> set[psutil.Process]:
    """The processes that this one, and those that it has started, have started."""
    return set(psutil.Process().children(recursive=True))


def outlive(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Of processes whose parent was killed, those that do not end.

    Ray's agents, which do no work, are not waited for, but ended: for a minute they try to tell their dead cluster of
    its death.
    """
    agents = {process for process in processes if name_of(process) in AGENTS}
    alive: list[psutil.Process] = psutil.wait_procs(processes - agents, timeout=PATIENCE)[1]
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    return alive


def name_of(process: psutil.Process) -> str | None:
    with suppress(psutil.NoSuchProcess):
        return str(process.name())
    return None


def _command_over_ray(reports: Connection, environment: dict[str, str], *arguments: Any) -> None:
    os.environ.update(environment)
    command(reports, *arguments)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, "it never comes to that"
        time.sleep(0.02)
