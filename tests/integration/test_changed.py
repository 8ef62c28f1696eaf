"""A run directory belongs to one job: what differs is refused by name, and what may differ is done anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigChanged, RunStopped
from tests.integration.support import carry_out, committed, job, write_text
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("changed")
    write_text(base)
    save_tiny("llama", base / "source")
    return base / "source"


@pytest.fixture(scope="module")
def stopped(source: Path) -> dict[str, Any]:
    """The settings of a run that has stopped after two blocks, and that no test takes further."""
    settings = job(source, source.parent / "stopped")
    with pytest.raises(RunStopped):
        carry_out(settings, stop=committed(source.parent / "stopped", 2))
    return settings


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("prune", {"sparsity": 0.6}, r"prune\.sparsity: 0\.5 in the ledger, 0\.6 asked for"),
        ("prune", {"recipe": ["magnitude"]}, r"prune\.recipe: .*wanda.* in the ledger, .*magnitude.* asked for"),
        ("prune", {"skip": ["mlp.*"]}, r'prune\.skip: \[\] in the ledger, \["mlp\.\*"\] asked for'),
        ("compute", {"dtype": "bfloat16"}, r'compute\.dtype: "float32" in the ledger, "bfloat16" asked for'),
        ("compute", {"batch": 2}, r"compute\.batch: 4 in the ledger, 2 asked for"),
        ("calibration", {"sequences": 5}, r"the calibration tokens changed: .* in the ledger, .* asked for"),
        ("calibration", {"sample": "random"}, r"the calibration tokens changed: .* in the ledger, .* asked for"),
    ],
)
def test_changed_settings_are_refused_by_name(
    section: str, change: dict[str, Any], message: str, stopped: dict[str, Any]
) -> None:
    changed = {**stopped, section: {**stopped.get(section, {}), **change}}
    with pytest.raises(ConfigChanged, match=message) as refused:
        carry_out(changed)
    assert refused.value.message.count(" in the ledger, ") == 1  # that one, and no other
    assert refused.value.message.endswith("use another output directory, or restore the setting")


def test_settings_that_only_look_different_are_no_change(stopped: dict[str, Any]) -> None:
    spelled_out = {"recipe": [{"wanda": {}}], "sparsity": "0.5", "skip": []}
    for prune in (spelled_out, {"recipe": [{"wanda": None}], "sparsity": 0.50}):
        with pytest.raises(RunStopped):
            carry_out({**stopped, "prune": prune, "compute": {"device": "cpu"}}, stop=lambda: True)


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source")
    settings = job(tmp_path / "source", tmp_path / "run")
    with pytest.raises(RunStopped):
        carry_out(settings, stop=committed(tmp_path / "run", 1))
    config = tmp_path / "source" / "config.json"
    original = config.read_text()
    config.write_text(json.dumps({**json.loads(original), "rms_norm_eps": 0.5}))
    with pytest.raises(ConfigChanged, match=r"the source checkpoint changed"):
        carry_out(settings)
    config.write_text(original)
    carry_out(settings)


def test_another_evaluation_is_made_without_pruning_again(source: Path, tmp_path: Path) -> None:
    first = carry_out(job(source, tmp_path, evaluate=None))
    assert (first.perplexity_before, first.perplexity_after) == (None, None)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").glob("*.safetensors")}
    found = []
    for windows in (2, 3):
        settings = job(source, tmp_path)
        settings["evaluate"]["windows"] = windows
        report = carry_out(settings)
        found.append((report.perplexity_before, report.perplexity_after))
    assert None not in found[0]
    assert found[0] != found[1]
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
