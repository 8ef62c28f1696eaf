"""Pruning as a job of a cluster: begun once, found again, its end told in the watcher's words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.jobs import JobFacts, Status
from cluster.submit import Wishes
from cluster.watch import submitted
from cluster.watch.submitted import AsJob
from pipeline.config import RunConfig, parse_config
from pipeline.errors import BudgetExceeded, ClusterUnreachable, ConfigError, RunStopped, SecateurError, StageFailed
from tests.cluster.fake_jobs import LOST, FakeJobs, some_facts
from tests.integration.support import job


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitted, "LOOK_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config(job(tmp_path / "source", tmp_path / "run", recipe=["magnitude"]), "the test")


def prune(server: FakeJobs, config: RunConfig, stop_asked: Callable[[], bool] = lambda: False) -> list[str]:
    """Prune, and return what was said meanwhile."""
    said: list[str] = []
    AsJob(server, Wishes(), said.append)(config, config.output.with_name("log.txt"), stop_asked)
    return said


def succeeding(config: RunConfig) -> Callable[[FakeJobs], None]:
    """What makes every job there write its model, and succeed."""

    def succeed(server: FakeJobs) -> None:
        (config.output / "model").mkdir(parents=True, exist_ok=True)
        for name in server.known:
            server.finish(name, "succeeded")

    return succeed


def test_a_run_is_submitted_once_and_its_log_is_kept(config: RunConfig) -> None:
    server = FakeJobs(on_poll=succeeding(config))
    server.pieces = ["block 1\n", "block 2\n"]
    said = prune(server, config)
    (submission,) = server.submitted
    assert said[-1] == f"submitted {submission.job} to http://head:8265"
    assert config.output.with_name("log.txt").read_text() == "block 1\nblock 2\n"


def test_a_watcher_that_comes_back_waits_for_the_job_that_is_there(config: RunConfig) -> None:
    there = some_facts("secateur-run-1", output=str(config.output))
    server = FakeJobs(there, on_poll=succeeding(config))
    assert prune(server, config) == []
    assert server.submitted == []


def test_a_stop_leaves_the_job_alone(config: RunConfig) -> None:
    server = FakeJobs()
    with pytest.raises(RunStopped, match="goes on in the cluster; the next watcher waits for it"):
        prune(server, config, lambda: bool(server.submitted))
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "exit_status", "kind", "words"),
    [
        ("failed", 1, StageFailed, "has failed: out of memory"),
        ("failed", 3, BudgetExceeded, "has failed: out of memory"),
        ("stopped", 75, StageFailed, "was stopped: submit"),
    ],
)
def test_a_job_that_did_not_succeed_is_told(
    status: Status, exit_status: int, kind: type[SecateurError], words: str, config: RunConfig
) -> None:
    server = FakeJobs(on_poll=lambda s: [s.finish(name, status, exit_status, "out of memory") for name in s.known])
    with pytest.raises(kind, match=words):
        prune(server, config)


def test_a_model_that_is_not_seen_here_is_said(config: RunConfig) -> None:
    server = FakeJobs(on_poll=lambda s: [s.finish(name, "succeeded") for name in s.known])
    with pytest.raises(ConfigError, match="is not seen here: `work` must be in a file system that the cluster"):
        prune(server, config)


class Flaky(FakeJobs):
    """Out of reach for the first `silences` answers about a job."""

    silences = 3

    def facts(self, job: str) -> JobFacts:
        if self.silences > 0:
            self.silences -= 1
            raise LOST
        return super().facts(job)


def test_a_cluster_out_of_reach_for_a_while_is_waited_for(config: RunConfig) -> None:
    server = Flaky(on_poll=succeeding(config))
    prune(server, config)
    assert (server.silences, len(server.submitted)) == (0, 1)


def test_a_cluster_out_of_reach_for_long_ends_this_try(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitted, "LOST_SECONDS", 0.0)
    with pytest.raises(ClusterUnreachable, match="was lost"):
        prune(Flaky(), config)
