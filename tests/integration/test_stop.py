"""Signals: the first asks for a stop after the block at hand, the second stops at once; status 75 says go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.ledger import Ledger
from tests.integration.processes import PATIENCE, ROOT, Child, command
from tests.integration.support import carry_out, job, outcome, write_text
from tests.tiny import save_tiny

GO_ON = 75


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a run whose undisturbed twin is finished."""
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source")
    carry_out(job(tmp_path / "source", tmp_path / "undisturbed"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(job(tmp_path / "source", tmp_path / "run")))
    return path


def call(arguments: list[str], log: Path, signals: dict[str, list[int]]) -> int:
    with Child(command, arguments, log, signals) as child:
        return child.exit_status()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_block_at_hand_and_says_how_to_go_on(number: int, config: Path) -> None:
    run_directory, log = config.parent / "run", config.parent / "log"
    assert call(["run", str(config)], log, {"prune: block 1/3": [number]}) == GO_ON
    lines = log.read_text().splitlines()
    assert any(line.startswith("stopping once this block is committed") for line in lines)
    facts, way_on = lines[-1].split(". Go on with: secateur ")
    assert facts == f"stopped as asked: 2 of 3 blocks are committed in {run_directory}"
    assert way_on == f"run {run_directory}"
    assert len(Ledger.read(run_directory).commits) == 2
    assert call(way_on.split(), log, {}) == 0
    assert "2 of 3 blocks are committed; going on from there" in log.read_text()
    assert outcome(run_directory) == outcome(config.parent / "undisturbed")


@pytest.mark.parametrize("line", ["evaluate before: block 1/3", "prune: block 2/3", "evaluate after: block 2/3"])
def test_a_run_can_be_stopped_between_any_two_blocks(line: str, config: Path) -> None:
    log = config.parent / "log"
    assert call(["run", str(config)], log, {line: [signal.SIGTERM]}) == GO_ON
    assert "perplexity after" not in log.read_text()
    assert call(["run", str(config)], log, {"replay: block 1/3": [signal.SIGTERM]}) in {0, GO_ON}
    assert call(["run", str(config)], log, {}) == 0
    assert outcome(config.parent / "run") == outcome(config.parent / "undisturbed")


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 2, [signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGINT]])
def test_a_second_signal_stops_at_once(numbers: list[int], config: Path) -> None:
    run_directory, log = config.parent / "run", config.parent / "log"
    assert call(["run", str(config)], log, {"prune: block 1/3": numbers}) == GO_ON
    said = " ".join(log.read_text().split())  # a line may be wrapped
    assert "interrupted; every committed block is kept, and the same command goes on from there" in said
    assert "Traceback" not in log.read_text()
    assert len(Ledger.read(run_directory).commits) == 1
    assert call(["run", str(config)], log, {}) == 0
    assert outcome(run_directory) == outcome(config.parent / "undisturbed")


def test_two_signals_from_outside_end_a_block_that_would_take_hours(config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["prune"]["recipe"] = [{"besa": {"epochs": 10_000_000}}]
    config.write_text(yaml.safe_dump(settings))
    code = "from cluster.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", code, "run", str(config), "--json"]
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stderr is not None
        wait_for_line(process, "prune: 3 of 3 blocks to do")
        process.send_signal(signal.SIGTERM)
        wait_for_line(process, "stopping once this block is committed")
        process.send_signal(signal.SIGTERM)
        output, rest = process.communicate(timeout=PATIENCE)
    assert process.returncode == GO_ON, rest
    assert output == ""
    assert "the same command goes on from there" in " ".join(rest.split())
    assert Ledger.read(config.parent / "run").commits == {}


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"the process ended with {process.wait()} before it said {beginning!r}: {''.join(lines)}")
