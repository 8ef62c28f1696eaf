"""`secateur watch` as its users call it."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.cluster.watch.watching import copied, settings
from tests.hub_server import HubServer
from tests.integration.support import run_command

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command; return its status and all that came out of it."""
    monkeypatch.setattr("cluster.cli_watch.console", Console(stderr=True, width=240))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = run_command(arguments, monkeypatch)
        return (status, *capfd.readouterr())

    return run


def written(plain: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    copied(tiny, tmp_path / "models" / "own")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{}")
    (tmp_path / "models" / "broken" / "model.safetensors").write_bytes(b"no model")
    plain = settings(
        tmp_path, tiny.parent / "text.txt", settle=0, sources=[{"directory": str(tmp_path / "models")}],
        publish={"directory": str(tmp_path / "out")},
    )  # fmt: skip
    return written(plain, tmp_path / "watch.yaml")


def test_once_prunes_what_is_new_and_status_and_retry_tell_and_mend_the_rest(call: Call, config: Path) -> None:
    status, output, said = call("watch", config, "--once")
    assert (status, output) == (0, "")
    assert "own@" in said
    assert ": published: " in said
    status, output, said = call("watch", "status", config, "--json")
    assert status == 0
    found = json.loads(output)
    releases = {release["found"]["name"]: release for release in found["releases"]}
    assert (releases["own"]["status"], releases["broken"]["status"]) == ("published", "quarantined")
    assert releases["own"]["location"].startswith(str(config.parent / "out" / "own"))
    assert releases["broken"]["reason"].startswith("plan: ")
    assert [attempt["outcome"] for attempt in releases["own"]["attempts"]] == ["published"]
    assert [source["error"] for source in found["sources"]] == [""]
    rows = [line for line in said.splitlines() if line.startswith(" own") or line.startswith("own")]
    assert "published" in rows[0]
    status, _, said = call("watch", "retry", config, "broken")
    assert (status, "quarantined before, to be done now" in said) == (0, True)
    status, _, said = call("watch", "retry", config, "own")
    assert (status, "no revision of own is quarantined or skipped" in said) == (1, True)


def test_status_before_anything_was_watched_names_the_way(call: Call, config: Path) -> None:
    status, _, said = call("watch", "status", config)
    assert status == 1
    assert f"nothing was watched yet; begin with: secateur watch {config}" in said


def test_watching_on_needs_a_schedule(call: Call, config: Path) -> None:
    status, _, said = call("watch", config)
    assert status == 1
    assert "there is no `schedule`: add one, or use --once with a scheduler of your own" in said


def test_a_watcher_keeps_on_until_it_is_told_to_stop(call: Call, tiny: Path, tmp_path: Path, hub: HubServer) -> None:
    hub.push("acme/tiny", tiny)
    plain = settings(tmp_path, tiny.parent / "text.txt", schedule={"every": "1h"})
    timer: list[threading.Timer] = []

    def stop_soon(request: str) -> None:
        if "/commit/" in request and not timer:
            timer.append(threading.Timer(2.0, signal.raise_signal, (signal.SIGTERM,)))
            timer[0].start()

    hub.ends = stop_soon
    status, output, said = call("watch", written(plain, tmp_path / "watch.yaml"))
    assert (status, output) == (75, "")
    assert "next look at the sources: " in said
    assert ": published: me/tiny-50pct@" in said
    assert "stopping once the blocks or checks at hand are done (jobs of a cluster go on" in said
    assert "stopped as asked; the same command goes on where this one left off" in said


def test_a_webhook_that_is_not_set_is_said_before_anything_begins(
    call: Call, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCH_HOOK", raising=False)
    plain = yaml.safe_load(config.read_text()) | {"webhook": {"url_from": "WATCH_HOOK"}}
    status, _, said = call("watch", written(plain, config), "--once")
    assert (status, "the environment variable WATCH_HOOK" in said) == (1, True)
    assert not (config.parent / "state.db").exists()
