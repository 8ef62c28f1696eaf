"""The command as its users call it: one JSON object where asked, lines for logs, a way out for every error."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from pipeline.errors import RunStopped
from tests.integration.narrow import exchange
from tests.integration.support import (
    LENGTH,
    WINDOWS,
    carry_out,
    committed,
    evaluation_windows,
    job,
    load,
    outcome,
    perplexity_of,
    run_command,
    write_text,
)
from tests.tiny import save_tiny

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    write_text(base)
    save_tiny("llama", base / "source")
    return base / "source"


@pytest.fixture(scope="module")
def finished(source: Path) -> Path:
    """A run directory in which all is done."""
    carry_out(job(source, source.parent / "finished"))
    return source.parent / "finished"


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(source, tmp_path / "run")))
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command; return its status and all that came out of it, below Python too."""
    monkeypatch.setattr("cluster.cli.console", Console(stderr=True, width=200))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = run_command(arguments, monkeypatch)
        return (status, *capfd.readouterr())

    return run


def only_object(output: str) -> dict[str, Any]:
    assert output.endswith("}\n")
    assert output.count("\n") == 1
    found: dict[str, Any] = json.loads(output)
    return found


def test_run_prints_its_report_as_one_object(call: Call, config: Path, finished: Path) -> None:
    status, output, _ = call("run", config, "--json")
    assert status == 0
    report = only_object(output)
    assert report == json.loads((config.parent / "run" / "report" / "report.json").read_text())
    assert report["achieved_sparsity"] == report["pruned_weights"] / report["prunable_weights"] == 0.5
    assert report["seconds"].keys() == {"read", "collect", "prune", "commit", "propagate"}
    assert report["perplexity_before"] != report["perplexity_after"]
    assert outcome(config.parent / "run") == outcome(finished)


def test_a_log_tells_each_block_and_closes_with_a_summary(call: Call, config: Path, source: Path) -> None:
    status, output, said = call("run", config, "--set", "prune.sparsity=0.25", "--set", "evaluate.windows=2")
    assert (status, output) == (0, "")
    assert "\x1b" not in said
    lines = said.splitlines()
    for task in ("evaluate before", "prune", "evaluate after"):
        blocks = [line for line in lines if line.startswith(f"{task}: block ")]
        assert [line.split()[len(task.split()) + 1] for line in blocks] == ["1/3", "2/3", "3/3"]
        assert all(line.endswith(" left)") for line in blocks)
        assert any(line.startswith(f"{task}: done in ") for line in lines)
    assert "25.0000% of 23,040 weights (asked: 0.25)" in said
    assert "perplexity before: " in said
    assert "Inference is as fast as before" in said
    assert lines[-1] == f"Next:  secateur verify {config.parent}/run --source {source}"


def test_the_next_command_that_the_summary_names_works(call: Call, config: Path) -> None:
    _, _, said = call("run", config)
    _, _, next_command = said.splitlines()[-1].partition("secateur ")
    status, _, said = call(*next_command.split())
    assert status == 0
    assert "verified: 30 tensors; 9 identical to the source byte for byte; 21 pruned, 11,520 of 23,040 weights" in said


def test_a_run_directory_goes_on_by_its_name(call: Call, config: Path, finished: Path) -> None:
    run_directory = config.parent / "run"
    with pytest.raises(RunStopped):
        carry_out(yaml.safe_load(config.read_text()), stop=committed(run_directory, 1))
    config.unlink()
    status, output, said = call("run", run_directory, "--json")
    assert status == 0
    assert "1 of 3 blocks are committed; going on from there" in said
    assert "prune: 2 of 3 blocks to do" in said
    assert only_object(output)["pruned_weights"] == 11_520
    assert outcome(run_directory) == outcome(finished)


def test_a_run_begun_with_relative_paths_goes_on_from_elsewhere(
    call: Call, source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    settings = job(Path("source"), Path(tmp_path.name))
    run_directory = source.parent / tmp_path.name
    with pytest.raises(RunStopped):
        carry_out(settings, stop=committed(run_directory, 2))
    monkeypatch.chdir(tmp_path)
    status, _, said = call("run", run_directory)
    assert status == 0
    assert "evaluate before" not in said  # done, and on the same text
    assert outcome(run_directory)["commits"] == outcome(finished)["commits"]


def test_a_directory_that_is_no_run_directory_is_refused(call: Call, tmp_path: Path) -> None:
    status, _, said = call("run", tmp_path)
    assert status == 1
    assert f"{tmp_path} is a directory without a config.yaml: neither a configuration nor a run directory" in said


def test_evaluate_agrees_with_a_plain_forward(call: Call, source: Path, finished: Path) -> None:
    windows, text = evaluation_windows(source), source.parent / "text.txt"
    shape = ["--sequence-length", str(LENGTH), "--windows", str(WINDOWS)]
    for model in (source, finished / "model"):
        status, output, said = call("evaluate", model, "--text", text, *shape, "--json")
        assert status == 0
        found = only_object(output)
        assert found["perplexity"] == pytest.approx(perplexity_of(load(model), windows), rel=1e-6)
        assert (found["windows"], found["sequence_length"], found["text"]) == (WINDOWS, LENGTH, str(text))
        assert f"perplexity {found['perplexity']:.4f} on 5 windows of 20 tokens of {text}" in said


def test_evaluate_takes_all_windows_unless_told_otherwise(call: Call, source: Path) -> None:
    text = source.parent / "text.txt"
    _, output, _ = call("evaluate", source, "--text", text, "--sequence-length", "60", "--batch", "7", "--json")
    assert only_object(output)["windows"] == 2000 // 60


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        ("--sequence-length", "1", "greater than or equal to 2"),
        ("--windows", "0", "greater than or equal to 1"),
        ("--batch", "0", "greater than or equal to 1"),
        ("--dtype", "bf16", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("--device", "warp", "'warp' cannot be used here"),
        ("--text", "/nowhere.txt", "there is no file /nowhere.txt"),
    ],
)
def test_evaluate_refuses_options_that_make_no_sense(
    option: str, value: str, fact: str, call: Call, source: Path
) -> None:
    options = {"--text": str(source.parent / "text.txt"), option: value}
    status, output, said = call("evaluate", source, *(part for pair in options.items() for part in pair))
    assert (status, output) == (1, "")
    assert fact in said


def test_verify_prints_one_object(call: Call, source: Path, finished: Path) -> None:
    status, output, said = call("verify", finished, "--source", source, "--json")
    assert status == 0
    found = only_object(output)
    assert (found["tensors"], found["pruned_tensors"], found["identical_tensors"]) == (30, 21, 9)
    assert (found["pruned_weights"], found["prunable_weights"]) == (11_520, 23_040)
    assert "(50.0000%)" in said


def test_verify_finds_a_byte_that_was_changed(call: Call, config: Path, source: Path) -> None:
    carry_out(yaml.safe_load(config.read_text()))
    shard = config.parent / "run" / "model" / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    status, output, said = call("verify", config.parent / "run", "--source", source, "--json")
    assert (status, output) == (1, "")
    assert "model-00003-of-00004.safetensors has sha256" in said
    assert "prune again in a new output directory" in said


def test_verify_of_an_unfinished_run_says_that_it_is_unfinished(call: Call, config: Path, source: Path) -> None:
    with pytest.raises(RunStopped):
        carry_out(yaml.safe_load(config.read_text()), stop=committed(config.parent / "run", 1))
    status, output, said = call("verify", config.parent / "run", "--source", source)
    assert (status, output) == (1, "")
    assert "secateur run" in said


def test_doctor_builds_when_asked_and_prints_one_object(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bool] = []
    monkeypatch.setattr("pipeline.paging.aio.is_built", lambda: bool(built))
    monkeypatch.setattr("pipeline.paging.aio.build", lambda: built.append(True))
    status, output, said = call("doctor", "--spool", tmp_path, "--build", "--json")
    found = only_object(output)
    assert (status, built) == (0, [True])
    assert found["torch"] == {"value": torch.__version__, "ok": True, "advice": ""}
    assert "MB/s" in found["spool read, threads"]["value"]
    assert "building DeepSpeed's aio: this takes some minutes, once" in said
    assert "building" not in call("doctor", "--spool", tmp_path, "--build")[2]
    assert list(tmp_path.iterdir()) == []


def test_an_error_shows_what_looks_like_markup_as_it_is(call: Call, tmp_path: Path) -> None:
    status, _, said = call("run", tmp_path / "[bold]no[/bold].yaml")
    assert status == 1
    assert f"error: cannot read the configuration {tmp_path}/[bold]no[/bold].yaml: No such file or directory" in said


def test_an_unknown_option_is_a_usage_error(call: Call) -> None:
    status, output, said = call("run", "x.yaml", "--sett", "a=b")
    assert (status, output) == (2, "")
    assert "--sett" in said


def test_help_names_every_command(call: Call) -> None:
    status, output, _ = call("--help")
    assert status == 0
    for name in ("run", "plan", "evaluate", "verify", "doctor", "demo-model"):
        assert f" {name} " in output


def test_a_terminal_gets_its_cursor_back_after_an_error(
    source: Path, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    monkeypatch.setattr("cluster.cli.console", Console(file=shown, force_terminal=True, width=100))
    shutil.copytree(source, tmp_path / "broken")
    exchange(tmp_path / "broken", "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(float("nan")))
    assert run_command(["run", config, "--set", f"model={tmp_path / 'broken'}"], monkeypatch) == 1
    assert "NaN or Inf" in shown.getvalue()
    assert shown.getvalue().rfind("\x1b[?25h") > shown.getvalue().rfind("\x1b[?25l")  # shown after hidden
