"""Real processes for the tests in which one must die: forked from a server that has everything imported already.

A child starts in milliseconds instead of the seconds that importing takes, and it may be killed like any process:
nothing of it lives in the process of the tests.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from cluster import cli, console
from pipeline.config import parse_config
from pipeline.ledger import RunLock
from pipeline.paging.pager import ALIGNMENT
from pipeline.progress import Silent
from pipeline.run import run

ROOT = Path(__file__).parents[2]
PATIENCE = 120
"""Seconds after which a child counts as hung."""


def fork_server() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first start launches it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])
    return context


class Child:
    """A process that runs one function of this module; killed, if need be, when the `with` block ends."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reports, theirs = multiprocessing.Pipe(duplex=False)
        self.process: ForkServerProcess = fork_server().Process(target=function, args=(theirs, *arguments))
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.join()
        self.reports.close()

    def wait_for_report(self) -> Any:
        """Return the next thing the child sends."""
        assert self.reports.poll(PATIENCE), "the child has sent nothing"
        return self.reports.recv()

    def exit_status(self) -> int:
        """Wait for the end; the status, or minus the number of the signal that ended it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "the child hangs"
        return self.process.exitcode


def prune(reports: Connection, settings: dict[str, Any]) -> None:
    """Run a job, silently, having said that it begins."""
    torch.set_num_threads(1)
    config = parse_config(settings, "the test")
    reports.send("begun")
    run(config, Silent(), lambda: False)


def prune_until_write(reports: Connection, settings: dict[str, Any], deadly: int) -> None:
    """Run a job, and die (SIGKILL) in the middle of the `deadly`-th thing it makes durable."""
    survived = 0

    def mortal(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal survived
            survived += 1
            if survived == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        return call

    for name in ("write", "fsync", "replace", "truncate"):
        setattr(os, name, mortal(getattr(os, name)))
    prune(reports, settings)


def prune_until_spooled(reports: Connection, settings: dict[str, Any], deadly: int) -> None:
    """Run a job whose hidden states are on disk, and die (SIGKILL) in the middle of the `deadly`-th write of them."""
    original, survived = os.pwritev, 0

    def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal survived
        survived += 1
        if survived == deadly:
            original(fd, [buffers[0][: ALIGNMENT * (buffers[0].nbytes // ALIGNMENT // 2)]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(fd, buffers, offset)

    os.pwritev = pwritev  # type: ignore[assignment]
    prune(reports, settings)


def prune_until_call(reports: Connection, settings: dict[str, Any], module: str, name: str) -> None:
    """Run a job, and die (SIGKILL) where it calls a function of a module; the disk is measured if that is one."""
    setattr(import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    run(parse_config(settings, "the test"), Silent(), lambda: False, probe="probes" in module)


def prune_with_small_files(reports: Connection, settings: dict[str, Any], largest: int) -> None:
    """Run a job where no file may grow beyond `largest` bytes, as on a disk that is full; report the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        prune(reports, settings)
    except BaseException as error:
        reports.send((type(error).__name__, str(error)))
        raise


def hold(reports: Connection, run_directory: Path) -> None:
    """Hold a run directory until killed."""
    with RunLock(run_directory):
        reports.send("held")
        signal.pause()


def command(reports: Connection, arguments: Sequence[str], log: Path, signals: dict[str, list[int]]) -> None:
    """Call the `secateur` command with its output in a file; raise signals as a line that starts so is said."""
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    say = console.PlainProgress.say

    def say_and_raise(self: console.PlainProgress, text: str) -> None:
        say(self, text)
        for number in next((signals[line] for line in signals if text.startswith(line)), []):
            os.kill(os.getpid(), number)

    console.PlainProgress.say = say_and_raise  # type: ignore[method-assign]
    sys.argv = ["secateur", *arguments]
    cli.main()
