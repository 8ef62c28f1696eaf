"""What `secateur watch` does and shows: a watcher set up from its file, and a table of all releases."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, loaded lazily
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.jobs import JobServer
from cluster.submit import Wishes
from cluster.watch.config import SubmitConfig, load_watch_config
from cluster.watch.hub import new_api
from cluster.watch.lifecycle import Release
from cluster.watch.notices import address_of
from cluster.watch.pruning import InOwnProcess, RunHere
from cluster.watch.rows import Attempt
from cluster.watch.state import State
from cluster.watch.submitted import AsJob
from pipeline.errors import ConfigError
from pipeline.human import human_bytes, human_seconds
from pipeline.progress import StopAsked


def watch(
    path: Path,
    console: Console,
    run: RunHere,
    connect: Callable[[str], JobServer],
    stop_asked: StopAsked,
    *,
    once: bool,
) -> None:
    """Watch as a file says, once or until asked to stop.

    `run` prunes, in a process of its own; where the file has a `submit` section, jobs at the server that `connect`
    returns for its address do.
    """
    from cluster.watch.watcher import Watcher  # needs APScheduler and jinja2, which only watching does

    config = load_watch_config(path)
    disable_progress_bars()  # of the hub's client: this is a log
    if config.webhook is not None:
        address_of(config.webhook)

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    pruner = InOwnProcess(run) if config.submit is None else as_job(config.submit, connect, say)
    watcher = Watcher(config, pruner, new_api(), say, stop_asked)
    if once:
        watcher.once()
    else:
        watcher.keep_on()


def as_job(submit: SubmitConfig, connect: Callable[[str], JobServer], say: Callable[[str], None]) -> AsJob:
    """Return what hands releases to the cluster of a `submit` section."""
    wishes = Wishes(
        grace=submit.grace, cpus=submit.cpus, gpus=submit.gpus, python=submit.python, install=submit.install
    )
    return AsJob(connect(submit.address), wishes, say)


def status(path: Path, console: Console) -> dict[str, Any]:
    """Show all releases as a table, and when each source was last asked; return it all as plain data."""
    state = _state_of(path)
    releases, now = state.releases(), state.clock()
    console.print(_table(releases, state, now))
    for source in state.sources():
        ago = human_seconds(max(0.0, now - source.checked))
        text = f"source {source.name}: asked {ago} ago{', ' + source.error if source.error else ''}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return {
        "releases": [_as_json(release, state.attempts(release.number)) for release in releases],
        "sources": [asdict(source) for source in state.sources()],
    }


def retry(path: Path, name: str, console: Console) -> None:
    """Give a model's quarantined and skipped revisions another chance; raises ConfigError where there are none."""
    revived = _state_of(path).revive(name)
    if not revived:
        raise ConfigError(f"no revision of {name} is quarantined or skipped; see: secateur watch status {path}")
    for release in revived:
        console.print(f"{release.label}: {release.status} before, to be done now", markup=False, highlight=False)


def _state_of(path: Path) -> State:
    config = load_watch_config(path)
    if not config.state.exists():
        raise ConfigError(f"{config.state} does not exist: nothing was watched yet; begin with: secateur watch {path}")
    return State(config.state)


def _table(releases: list[Release], state: State, now: float) -> Table:
    table = Table("model", "revision", "size", "status", "step", "tries", "since", "where or why", box=None)
    for release in releases:
        status: str = release.status
        if status == "running" and not state.is_worked_on(release):
            status += " (its process is gone)"  # the next watcher takes it
        table.add_row(
            Text(release.found.name), release.found.revision[:12], human_bytes(release.found.num_bytes), status,
            release.step, str(release.failures), human_seconds(max(0.0, now - release.changed_at)),
            Text(release.location or release.reason),
        )  # fmt: skip
    return table


def _as_json(release: Release, attempts: list[Attempt]) -> dict[str, Any]:
    content = asdict(release)
    content["found"]["facts"].pop("files", None)  # by the hundred
    return {**content, "attempts": [asdict(attempt) for attempt in attempts]}
