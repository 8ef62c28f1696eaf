"""What becomes of a release whose work is cut off, held elsewhere, begun with other settings, or tells secrets."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.watch.discovery import discover
from cluster.watch.hub import new_api
from pipeline.config import RunConfig
from pipeline.errors import ClusterUnreachable, NumericsError, RunLocked, RunStopped, StateError, StorageError
from pipeline.progress import StopAsked
from pipeline.run import run
from tests.cluster.watch.conftest import TOKEN
from tests.cluster.watch.releases import Clock
from tests.cluster.watch.watching import InThisProcess, Watch, settings
from tests.hub_server import HubServer


def test_a_stop_puts_the_release_back_where_it_was(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    stopping: list[bool] = []

    def run_until_stopped(config: RunConfig, progress: Any, stop_asked: StopAsked) -> None:
        stopping.append(True)
        run(config, progress, stop_asked)

    watch = Watch(settings(tmp_path, text), clock, InThisProcess(run_until_stopped), stop_asked=lambda: bool(stopping))
    with pytest.raises(RunStopped, match="the same command goes on where this one left off"):
        watch.once()
    (release,) = watch.releases
    assert (release.status, release.step, release.failures) == ("found", "prune", 0)
    assert [release.status for release in Watch(settings(tmp_path, text), clock).once()] == ["published"]


def test_a_run_that_outlived_its_watcher_is_waited_for(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)

    def locked(config: RunConfig, progress: Any, stop_asked: StopAsked) -> None:
        raise RunLocked("another process holds it")

    (release,) = Watch(settings(tmp_path, text), clock, InThisProcess(locked)).once()
    assert (release.status, release.failures, release.due) == ("found", 0, clock.now + 30)
    clock.now += 30
    assert [release.status for release in Watch(settings(tmp_path, text), clock).once()] == ["published"]


def test_a_run_begun_with_other_settings_is_begun_anew(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)

    def run_and_fail(config: RunConfig, progress: Any, stop_asked: StopAsked) -> None:
        run(config, progress, stop_asked)
        raise MemoryError("out of luck")

    (release,) = Watch(settings(tmp_path, text), clock, InThisProcess(run_and_fail)).once()
    assert (release.status, release.reason) == ("waiting", "prune: MemoryError: out of luck")
    clock.now += 60
    plain = settings(tmp_path, text)
    plain["job"]["prune"]["sparsity"] = 0.25
    watch = Watch(plain, clock)
    assert [release.status for release in watch.once()] == ["published"]
    assert any("begun anew, for it was begun with other settings" in line for line in watch.said)
    assert list(hub.titles("me/tiny-25pct"))


def test_what_a_quarantined_release_said_stays_and_goes_with_its_publication(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)

    class Failing:
        def __call__(self, config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
            log.write_text("what went wrong\n")
            raise NumericsError(f"its output is in {log}")

    watch = Watch(settings(tmp_path, text), clock, Failing())
    (release,) = watch.once()
    own = watch.watcher._worker.directory_of(release.found)
    assert release.status == "quarantined"
    assert release.reason.endswith(f"{own}/log.txt")
    watch.once()  # which sweeps
    assert [path.name for path in own.iterdir()] == ["log.txt"]
    watch.watcher.state.revive("acme/tiny")
    assert [release.status for release in Watch(settings(tmp_path, text), clock).once()] == ["published"]
    assert not own.exists()


def test_a_release_that_kills_every_watcher_is_cleared_away_by_the_one_that_says_so(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    watch = Watch(settings(tmp_path, text, retry={"interruptions": 0}), clock)
    discover(watch.config, watch.watcher.state, new_api(), watch.said.append, lambda: False)
    claim = watch.watcher.state.claim(watch.config.ceilings, watch.config.retry_policy)
    assert claim is not None
    own = watch.watcher._worker.directory_of(claim.release.found)
    (own / "source").mkdir(parents=True)
    claim.let_go()  # as the kernel does for a process that dies
    assert [release.status for release in watch.once()] == ["quarantined"]
    assert not own.exists()
    assert any("quarantined: plan: the process died 1 times" in line for line in watch.said)


def test_a_release_without_room_waits_for_it_however_long(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", tiny)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patch:
        patch.setattr("cluster.watch.steps.shutil.disk_usage", lambda path: full)
        for tries in range(1, 6):
            (release,) = Watch(settings(tmp_path, text), clock).once()
            assert (release.status, release.failures) == ("waiting", tries)
            clock.now = release.due
    assert "of disk, and 0 B are free in" in release.reason
    assert [release.status for release in Watch(settings(tmp_path, text), clock).once()] == ["published"]


def test_a_cluster_out_of_reach_is_waited_for_and_its_job_keeps_its_files(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)

    def lost(config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
        (config.output / "of-the-job").mkdir(parents=True, exist_ok=True)
        raise ClusterUnreachable("http://head:8265 does not answer")

    watch = Watch(settings(tmp_path, text, retry={"attempts": 2, "first_wait": 60.0}), clock, lost)
    for num_failures in range(1, 5):
        (release,) = watch.once()
        assert (release.status, release.failures) == ("waiting", num_failures)
        assert len(list((tmp_path / "work").glob("*/run/of-the-job"))) == 1
        clock.now += 7 * 3600


def test_a_stop_is_heeded_between_two_models_of_a_source(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    for name in ("acme/a", "acme/b", "acme/c"):
        hub.push(name, tiny)
    watch = Watch(settings(tmp_path, text), clock, stop_asked=lambda: bool(watch.releases))
    with pytest.raises(RunStopped):
        watch.once()
    assert len(watch.releases) == 1


def test_a_directory_that_cannot_be_made_is_named(text: Path, tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "work").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot make .*/work: File exists; make it writable, or name another"):
        Watch(settings(tmp_path, text), clock)
    (tmp_path / "work").unlink()
    (tmp_path / "state.db.locks").write_text("in the way")
    with pytest.raises(StateError, match=r"state\.db cannot be used as a watcher's state: .*File exists"):
        Watch(settings(tmp_path, text), clock)


def test_the_token_is_in_no_log_state_card_or_configuration(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    hub.push("acme/tiny", tiny)

    def run_and_tell(config: RunConfig, progress: Any, stop_asked: StopAsked) -> None:
        run(config, progress, stop_asked)
        kept = "".join(path.read_text() for path in config.output.rglob("*.yaml"))
        kept += "".join(path.read_text() for path in config.output.rglob("*.json*"))
        assert TOKEN not in kept
        raise ValueError(f"a library that says the token: {TOKEN}")

    watch = Watch(settings(tmp_path, text), clock, InThisProcess(run_and_tell))
    watch.once()
    clock.now += 60
    again = Watch(settings(tmp_path, text), clock)
    assert [release.status for release in again.once()] == ["published"]
    assert any("a library that says the token: (token)" in line for line in watch.said)
    assert TOKEN not in "".join([*watch.said, *again.said, caplog.text])
    assert TOKEN.encode() not in (tmp_path / "state.db").read_bytes()
    assert all(TOKEN.encode() not in content for content in hub.files_at_head("me/tiny-50pct").values())


def test_a_clock_that_is_set_back_while_it_watches_does_not_hold_the_next_look(
    hub: HubServer, text: Path, tmp_path: Path, clock: Clock
) -> None:
    plain = settings(tmp_path, text, schedule={"every": "1h"})
    looks: list[bool] = []

    def stop_asked() -> bool:
        looks.append(True)
        if len(looks) == 3:
            clock.now -= 86_400
        return sum(line.startswith("next look") for line in watch.said) == 2

    watch = Watch(plain, clock, stop_asked=stop_asked)
    with pytest.raises(RunStopped):
        watch.watcher.keep_on()
    assert any(line.startswith("the clock was moved by -864") for line in watch.said)
