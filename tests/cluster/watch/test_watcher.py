"""A watcher from source to publication, on a hub of this machine and in directories, with real tiny models."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.progress import StopAsked
from pipeline.run import run
from tests.cluster.watch.releases import Clock
from tests.cluster.watch.watching import InThisProcess, Watch, changed, copied, cut_short, poisoned, settings
from tests.hub_server import HubServer, Trouble
from tests.integration.support import carry_out, digests, job, load


def test_a_new_revision_is_pruned_checked_and_published_and_a_second_look_does_nothing(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    commit = hub.push("acme/tiny", tiny)
    watch = Watch(settings(tmp_path, text), clock)
    (release,) = watch.once()
    assert (release.status, release.reason) == ("published", "")
    assert release.location == f"me/tiny-50pct@{hub.repositories['me/tiny-50pct'].commits[-1].sha}"
    assert hub.titles("me/tiny-50pct") == [f"secateur: acme/tiny@{commit}"]
    assert hub.repositories["me/tiny-50pct"].private
    assert list((tmp_path / "work").iterdir()) == []
    before = len(hub.requests)
    watch.once()
    assert [request.path for request in hub.requests[before:]] == ["/api/models"]


def test_what_is_published_is_what_a_run_by_hand_makes_and_loads(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    Watch(settings(tmp_path, text), clock).once()
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files_at_head("me/tiny-50pct").items():
        (downloaded / name).write_bytes(content)
    load(downloaded)
    plain = job(tiny, tmp_path / "run", recipe=["magnitude"])
    plain |= {name: settings(tmp_path, text)["job"][name] for name in ("calibration", "evaluate", "compute")}
    carry_out(plain)
    by_hand, there = digests(tmp_path / "run" / "model"), digests(downloaded)
    assert {name: there[name] for name in by_hand} == by_hand
    card = (downloaded / "README.md").read_text()
    assert "| perplexity, this model |" in card
    assert "Inference is as fast as before" in card


def test_a_changed_revision_runs_again(hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock) -> None:
    first = hub.push("acme/tiny", tiny)
    watch = Watch(settings(tmp_path, text), clock)
    watch.once()
    second = hub.push("acme/tiny", changed(tiny, tmp_path / "new", seed=1))
    watch.once()
    titles = [f"secateur: acme/tiny@{commit}" for commit in (first, second)]
    assert hub.titles("me/tiny-50pct") == titles


def test_bad_releases_are_set_aside_with_their_reasons_and_stop_nobody(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/a-cut-short", cut_short(tiny, tmp_path / "cut"))
    hub.push("acme/b-licence", tiny, licence="secret")
    hub.push("acme/c-poisoned", poisoned(tiny, tmp_path / "nan"))
    hub.push("acme/d-good", tiny)
    pickled = copied(tiny, tmp_path / "pickled")
    for shard in pickled.glob("*.safetensors*"):
        shard.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.push("acme/e-pickled", pickled)
    watch = Watch(settings(tmp_path, text, filters={"licences": ["apache-2.0"]}, limits={"jobs": 2}), clock)
    reasons = {release.found.name: (release.status, release.reason) for release in watch.once()}
    assert reasons["acme/d-good"] == ("published", "")
    status, reason = reasons["acme/a-cut-short"]
    assert status == "quarantined"
    assert "model-00002-of-00007.safetensors" in reason
    assert reasons["acme/b-licence"] == ("skipped", "its licence is secret, not of filters.licences")
    status, reason = reasons["acme/c-poisoned"]
    assert status == "quarantined"
    assert "NaN" in reason
    assert reasons["acme/e-pickled"] == ("skipped", "it has no safetensors weights")
    assert set(hub.repositories) - {"acme/" + name for name in ("a-cut-short", "b-licence", "c-poisoned")} == {
        "acme/d-good", "acme/e-pickled", "me/d-good-50pct",
    }  # fmt: skip
    assert not any(request.path.endswith(".bin") for request in hub.requests)
    before = len(hub.requests)
    watch.once()
    assert len(hub.requests) == before + 3  # the pages of the listing, and nothing else


def test_a_model_that_fails_the_gate_is_not_published(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    watch = Watch(settings(tmp_path, text, gate={"max_perplexity": 1.5}), clock)
    (release,) = watch.once()
    assert release.status == "quarantined"
    assert release.reason.startswith("gate: the pruned model failed 1 of 3 checks: perplexity is ")
    assert release.reason.endswith("asked was at most 1.5")
    assert "me/tiny-50pct" not in hub.repositories
    assert list((tmp_path / "work").iterdir()) == []


def test_a_release_that_does_not_fit_is_skipped_before_its_weights_are_fetched(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    plain = settings(tmp_path, text)
    plain["job"]["memory"] = {"host": "1MB"}
    (release,) = Watch(plain, clock).once()
    assert release.status == "skipped"
    assert release.reason.startswith("plan: ")
    assert "memory.host" in release.reason
    assert {r.range for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET"} == {"bytes=0-100000"}


def test_what_needs_more_disk_than_the_limit_is_skipped(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    watch = Watch(settings(tmp_path, text, limits={"disk": "100kB"}), clock)
    (release,) = watch.once()
    assert (release.status, "limits.disk is 100 kB" in release.reason) == ("skipped", True)
    watch = Watch(settings(tmp_path, text, limits={"disk": "10MB"}), clock)
    assert [release.status for release in watch.once()] == ["published"]  # judged again


def test_with_every_third_request_failing_every_release_is_published_once(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    names = [f"acme/m{index}" for index in range(2)]
    for seed, name in enumerate(names):
        hub.push(name, changed(tiny, tmp_path / f"new{seed}", seed))
    watch = Watch(settings(tmp_path, text, retry={"attempts": 1000}), clock)
    hub.trouble = Trouble(seed=1, kinds=("error", "cut", "lost", "hang"), hang_seconds=0.02)
    for _ in range(200):
        watch.once()
        clock.now += 86_400
        if list(watch.statuses().values()) == ["published"] * 2:
            break
    assert watch.statuses() == dict.fromkeys(names, "published")
    assert {kind.split()[0] for kind in hub.trouble.suffered} == {"error", "cut", "lost", "hang"}
    for name in names:
        there = f"me/{name.removeprefix('acme/')}-50pct"
        assert len(hub.titles(there)) == 1
        index = json.loads(hub.files_at_head(there)["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) <= hub.files_at_head(there).keys()


def test_a_lost_state_publishes_nothing_twice(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    Watch(settings(tmp_path, text), clock).once()
    (tmp_path / "state.db").unlink()
    before = len(hub.requests)
    (release,) = Watch(settings(tmp_path, text), clock).once()
    assert release.status == "published"
    assert len(hub.titles("me/tiny-50pct")) == 1
    assert not any(request.path.startswith("/cdn/") for request in hub.requests[before:])


def test_models_in_a_directory_are_published_to_a_directory_once_they_have_settled(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    models, out = tmp_path / "models", tmp_path / "out"
    (copied(tiny, models / "own") / "config.json").touch()
    plain = settings(tmp_path, text, sources=[{"directory": str(models)}], publish={"directory": str(out)}, settle=60)
    watch = Watch(plain, clock)
    assert watch.once() == []
    clock.now += 100
    (release,) = watch.once()
    assert release.status == "published"
    place = out / "own" / release.found.revision[:12]
    assert release.location == str(place)
    load(place)
    watch.once()
    assert len(watch.releases) == 1
    os.utime(models / "own" / "config.json", (clock.now, clock.now))
    clock.now += 100
    assert [release.status for release in watch.once()] == ["published"] * 2
    assert hub.requests == []


def test_a_directory_that_changes_while_it_is_pruned_is_let_go(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    models = tmp_path / "models"
    copied(tiny, models / "own")

    def run_and_change(config: RunConfig, progress: Any, stop_asked: StopAsked) -> None:
        run(config, progress, stop_asked)
        shutil.rmtree(models / "own")

    plain = settings(tmp_path, text, sources=[{"directory": str(models)}], publish={"directory": str(tmp_path / "out")})
    clock.now += 1000
    (release,) = Watch(plain, clock, InThisProcess(run_and_change)).once()
    assert release.status == "skipped"
    assert "is no longer what it was when it was found" in release.reason
    assert not (tmp_path / "out").exists()


def test_a_failing_source_is_noted_and_does_not_stop_the_others(
    hub: HubServer, tiny: Path, text: Path, tmp_path: Path, clock: Clock
) -> None:
    hub.push("acme/tiny", tiny)
    sources = [{"model": "nobody/none"}, {"directory": str(tmp_path / "nowhere")}, {"model": "acme/tiny"}]
    watch = Watch(settings(tmp_path, text, sources=sources), clock)
    assert [release.status for release in watch.once()] == ["published"]
    errors = {check.name: check.error for check in watch.watcher.state.sources()}
    assert "RepositoryNotFoundError" in errors["nobody/none"]
    assert "No such file or directory" in errors[str(tmp_path / "nowhere")]
    assert errors["acme/tiny"] == ""
