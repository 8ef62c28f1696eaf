"""What becomes of a release whose work is cut off, held elsewhere, begun with other settings, or tells secrets."""

import time
from pathlib import Path
from typing import Any

import pytest

from cluster.watch.pruning import InThisProcess
from pipeline.config import RunConfig
from pipeline.errors import RunLocked, RunStopped
from pipeline.progress import StopAsked
from pipeline.run import run
from tests.cluster.watch.conftest import TOKEN
from tests.cluster.watch.releases import Clock
from tests.cluster.watch.watching import Watch, settings
from tests.hub_server import HubServer


@pytest.fixture
def text(tiny: Path) -> Path:
    return tiny.parent / "text.txt"


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


def files_at_head(hub: HubServer, name: str) -> dict[str, bytes]:
    return dict(hub.repositories[name].commits[-1].files)


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
    assert all(TOKEN.encode() not in content for content in files_at_head(hub, "me/tiny-50pct").values())


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
