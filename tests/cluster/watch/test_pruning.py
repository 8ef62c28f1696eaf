"""Pruning in a process of its own: its end, its errors, its death, and a stop are told as if it ran here."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.watch.pruning import InOwnProcess
from pipeline.config import RunConfig, parse_config
from pipeline.errors import CheckpointError, RunStopped, StageFailed
from pipeline.ledger import Ledger
from pipeline.progress import Progress, StopAsked
from pipeline.run import run
from tests.cluster.watch.watching import dies_with_its_watcher
from tests.integration.support import INDEX, job


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> RunConfig:
    return parse_config(job(tiny, tmp_path / "run", recipe=["magnitude"]), "the test")


def die(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> None:
    os.write(2, b"a word of farewell\n")
    os._exit(7)


def run_until_stopped(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> None:
    while not stop_asked():
        pass
    raise RunStopped("stopped as asked")


def run_for_ever(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> None:
    Path(config.output).with_name("pid").write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def be_a_watcher(config: RunConfig, log: Path) -> None:
    InOwnProcess(run_for_ever)(config, log, never)


def never() -> bool:
    return False


def test_a_run_ends_in_its_directory_with_what_it_said_in_the_log(config: RunConfig, tmp_path: Path) -> None:
    InOwnProcess(run)(config, tmp_path / "log.txt", never)
    assert (config.output / "model" / INDEX).exists()
    assert len(Ledger.read(config.output).commits) == 3
    assert (tmp_path / "log.txt").exists()


def test_an_error_is_raised_here_as_it_was_there(config: RunConfig, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = config.model_copy(update={"model": config.model.model_copy(update={"path": tmp_path / "empty"})})
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        InOwnProcess(run)(broken, tmp_path / "log.txt", never)


@pytest.mark.parametrize(
    ("function", "fact"), [(die, r"signal 9 \(SIGKILL: perhaps out of memory\)"), (leave, "status 7")]
)
def test_a_process_that_dies_takes_nothing_with_it(
    function: Callable[..., Any], fact: str, config: RunConfig, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(StageFailed, match=f"the process that prunes died with {fact}; its output is in {log}"):
        InOwnProcess(function)(config, log, never)
    assert log.read_text() == ("" if function is die else "a word of farewell\n")


def test_a_stop_reaches_the_process(config: RunConfig, tmp_path: Path) -> None:
    asked = threading.Event()
    threading.Timer(0.2, asked.set).start()
    with pytest.raises(RunStopped, match="stopped as asked"):
        InOwnProcess(run_until_stopped)(config, tmp_path / "log.txt", asked.is_set)


def test_a_watcher_that_is_killed_takes_the_process_with_it(config: RunConfig, tmp_path: Path) -> None:
    watcher = multiprocessing.get_context("spawn").Process(target=be_a_watcher, args=(config, tmp_path / "log.txt"))
    assert dies_with_its_watcher(watcher, tmp_path / "pid")
