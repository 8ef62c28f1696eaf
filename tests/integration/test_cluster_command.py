"""`secateur run` with a `cluster:` section: Ray is started for it, joined, or said to be missing."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.integration.clusters import alone, forked_workers, spread
from tests.integration.support import carry_out, outcome, refusal, run_command, write_text
from tests.tiny import save_tiny


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source")
    return alone(tmp_path / "source", tmp_path / "alone")


def configuration(settings: dict[str, Any], tmp_path: Path, **cluster: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(spread(settings, tmp_path / "run", **cluster)))
    return path


def test_ray_is_started_for_a_run_and_ends_with_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(settings, tmp_path, address="local", stages=3)
    with forked_workers():
        assert run_command(["run", config], monkeypatch) == 0
    assert not ray.is_initialized()
    assert "3 stages of 1 block x 1 replica, handoff pruned; there is room for 3 workers" in capsys.readouterr().err
    carry_out(settings)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:1", "Connection refused"), ("nowhere.invalid:6379", "Name or service not known")]
)
def test_an_address_without_a_cluster_is_refused_at_once(
    address: str,
    why: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configuration(settings, tmp_path, address=address)
    said = refusal(config, tmp_path / "source", monkeypatch, capsys)
    assert re.match(
        rf"cluster\.address: no Ray cluster .*answers at {address} \(.*{why}\); .* or use auto, or local", said
    )


def test_without_ray_a_run_over_a_cluster_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        assert name == "ray"

    monkeypatch.setattr("cluster.run.find_spec", absent)
    said = refusal(configuration(settings, tmp_path), tmp_path / "source", monkeypatch, capsys)
    assert said == (
        "the settings have a `cluster` section, but ray is not installed; pip install 'secateur[cluster]', or remove "
        "the section to run in this process\n"
    )
