"""Watchers that are killed, anywhere and at the worst instants: each release is published whole, and once."""

import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.watch.state import State
from tests.cluster.watch.watching import changed, settings
from tests.hub_server import HubServer, Trouble
from tests.integration.processes import Child
from tests.integration.support import write_text
from tests.integration.watchers import watch_until_all_is_published
from tests.tiny import save_tiny

KILLS = 20
DAY = 86_400.0
NAMES = ("acme/one", "acme/two")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("watch-kill")
    write_text(base)
    save_tiny("llama", base / "source")
    return base / "source"


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for seed, name in enumerate(NAMES):
            server.push(name, changed(source, tmp_path / f"model{seed}", seed))
        yield server


@pytest.fixture
def plain(source: Path, tmp_path: Path) -> dict[str, Any]:
    retry = {"attempts": 100_000, "interruptions": 100_000, "first_wait": 0.01, "longest_wait": 0.05}
    return settings(tmp_path, source.parent / "text.txt", retry=retry, limits={"jobs": 2})


def start(hub: HubServer, plain: dict[str, Any], clock_error: float = 0.0) -> Child:
    cache = str(Path(plain["work"]) / "cache")
    return Child(watch_until_all_is_published, plain, hub.address, cache, len(NAMES), clock_error)


def assert_each_is_published_once(hub: HubServer, plain: dict[str, Any]) -> None:
    for name in NAMES:
        repository = hub.repositories[f"me/{name.removeprefix('acme/')}-50pct"]
        ours = [commit for commit in repository.commits if commit.title.startswith("secateur: ")]
        assert [commit.title for commit in ours] == [f"secateur: {name}@{hub.repositories[name].commits[0].sha}"]
        files = ours[0].files
        assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) <= files.keys()
        assert files.keys() >= {"README.md", "config.json", "tokenizer.json", "pruning.json"}
    releases = State(Path(plain["state"])).releases()
    assert [(release.found.name, release.status) for release in releases] == [(name, "published") for name in NAMES]
    assert [path.name for path in Path(plain["work"]).iterdir() if path.name != "cache"] == []


def test_killed_at_twenty_instants_with_a_failing_hub_and_a_wrong_clock(hub: HubServer, plain: dict[str, Any]) -> None:
    chance = random.Random(0)
    hub.trouble = Trouble(seed=0, kinds=("error", "cut", "lost", "hang"), hang_seconds=0.05)
    with ExitStack() as alive:
        watchers = [alive.enter_context(start(hub, plain)) for _ in range(2)]
        ends: list[int | None] = []
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.1, 1.0))
            one = chance.randrange(2)
            watchers[one].process.kill()
            watchers[one].process.join()
            ends.append(watchers[one].process.exitcode)
            watchers[one] = alive.enter_context(start(hub, plain, clock_error=chance.uniform(-DAY, DAY)))
        hub.trouble.share = 0.1
        assert [watcher.exit_status() for watcher in watchers] == [0, 0]
    assert ends.count(-9) >= KILLS // 2  # the others had nothing left to do
    assert hub.trouble.suffered
    assert_each_is_published_once(hub, plain)


@pytest.mark.parametrize("carried_out", [False, True], ids=["before it is carried out", "before it is answered"])
@pytest.mark.parametrize(
    "request_", ["GET /cdn/", "POST /api/repos/create", "POST .*/info/lfs", "PUT /lfs/", "POST .*/commit/"]
)
def test_killed_at_the_first_request_of_a_kind(
    request_: str, carried_out: bool, hub: HubServer, plain: dict[str, Any]
) -> None:
    with start(hub, plain) as first:
        killed: list[str] = []

        def kill(request: str) -> None:
            if not killed and re.match(request_, request):
                killed.append(request)
                first.process.kill()

        if carried_out:
            hub.ends = kill
        else:
            hub.begins = kill
        assert first.exit_status() == -9
    assert len(killed) == 1
    with start(hub, plain, clock_error=-DAY) as second:
        assert second.exit_status() == 0
    assert_each_is_published_once(hub, plain)
