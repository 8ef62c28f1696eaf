"""Pruning a release as a job of a Ray cluster, which needs no watcher: one that comes back finds the job it began.

The cluster and the watcher must see the same files: a release is fetched, gated and published by the watcher.
"""

import time
from collections.abc import Callable
from pathlib import Path

from cluster.jobs import EXIT_REFUSED, JobFacts, JobServer
from cluster.submit import Wishes, explain, submit
from pipeline.config import RunConfig, resolved
from pipeline.errors import BudgetExceeded, ClusterUnreachable, ConfigError, RunStopped, StageFailed
from pipeline.progress import StopAsked

LOOK_SECONDS = 2.0
"""Between two looks at a job."""

LOST_SECONDS = 600.0
"""How long the cluster may be out of reach before this try at the release is given up."""


class AsJob:
    """A `Pruner` that hands runs to a cluster."""

    def __init__(self, server: JobServer, wishes: Wishes, say: Callable[[str], None]) -> None:
        self._server, self._wishes, self._say = server, wishes, say

    def __call__(self, config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
        """Wait for the job of this run directory, submitted now unless it is there already.

        Raises RunStopped once a stop is asked for, and leaves the job alone; StageFailed where the job has failed or
        was stopped by others, BudgetExceeded where it does not fit, ConfigError where its files are not seen here.
        """
        job = self._under_way(config.output)
        if job is None:
            job = submit(self._server, resolved(config), self._wishes, self._say)
            self._say(f"submitted {job} to {self._server.address}")
        facts = self._wait(job, stop_asked)
        log.write_text(self._server.log(job), encoding="utf-8")
        if facts.status != "succeeded":
            kind = BudgetExceeded if facts.exit_status == EXIT_REFUSED else StageFailed
            raise kind(explain(facts))
        if not (config.output / "model").exists():
            raise ConfigError(
                f"{job} has succeeded, but {config.output}/model is not seen here: `work` must be in a file system "
                "that the cluster's machines share with this one, under the same path"
            )

    def _under_way(self, output: Path) -> str | None:
        """Return the job that works in a run directory now."""
        names = [facts.job for facts in self._server.jobs() if facts.output == str(output) and not facts.is_over]
        return names[0] if names else None

    def _wait(self, job: str, stop_asked: StopAsked) -> JobFacts:
        """Return what is known of a job once it is over; a cluster may be out of reach for a while."""
        answered = time.monotonic()
        while True:
            if stop_asked():
                raise RunStopped(f"{job} goes on in the cluster; the next watcher waits for it")
            try:
                facts = self._server.facts(job)
            except ClusterUnreachable:
                if time.monotonic() - answered > LOST_SECONDS:
                    raise
            else:
                answered = time.monotonic()
                if facts.is_over:
                    return facts
            time.sleep(LOOK_SECONDS)
