"""How a release is pruned: as a process of its own, so that one that dies of its model takes nothing with it.

The watcher knows just the protocol `Pruner`; behind it there may be a cluster as well (`submitted.py`).
"""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from pipeline.config import RunConfig
from pipeline.errors import SecateurError, StageFailed
from pipeline.progress import Progress, Silent, StopAsked

RunHere = Callable[[RunConfig, Progress, StopAsked], Any]
"""What prunes in the process that calls it, such as `pipeline.run.run`."""

LOOK_SECONDS = 0.5


class Pruner(Protocol):
    """Carries out a run to its end, or goes on with it; its outcome is in the run directory."""

    def __call__(self, config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
        """Return when the run is finished; raises RunStopped once `stop_asked()` is true, or any SecateurError."""


class InOwnProcess:
    """Prunes in a process of its own, which stops at its next commit when the watcher asks, and dies with it."""

    def __init__(self, run: RunHere) -> None:
        """`run`: a function that a new process can import."""
        self._run = run

    def __call__(self, config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
        """Run to the end; raises what the run raised, or StageFailed where its process died."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._run, config, log))
        process.start()
        theirs.close()
        with ours:
            error = _outcome(ours, stop_asked)
            process.join()  # before the connection is closed, which would end it as if the watcher were gone
        if isinstance(error, SecateurError):
            raise error
        if process.exitcode != 0:
            raise StageFailed(f"the process that prunes died with {_status(process.exitcode)}; its output is in {log}")


def _outcome(connection: Connection, stop_asked: StopAsked) -> SecateurError | None:
    """Wait for what the process reports; None where it ended well, or died."""
    asked = False
    while not connection.poll(LOOK_SECONDS):
        if stop_asked() and not asked:
            connection.send("stop")
            asked = True
    try:
        error: SecateurError | None = connection.recv()
    except EOFError:
        return None
    return error


def _work(connection: Connection, run: RunHere, config: RunConfig, log: Path) -> None:
    """Run, in the new process, with all that is said in a file."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the watcher decides when to stop
        signal.signal(number, signal.SIG_IGN)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(fd, sys.stdout.fileno())
    os.dup2(fd, sys.stderr.fileno())
    stop = Event()
    Thread(target=_listen, args=(connection, stop), daemon=True).start()
    try:
        run(config, Silent(), stop.is_set)
    except SecateurError as error:
        connection.send(error)
    else:
        connection.send(None)


def _listen(connection: Connection, stop: Event) -> None:
    """Wait for the watcher's word; once it is gone, end at once: what is committed is safe, and another may go on."""
    try:
        connection.recv()
        stop.set()
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


def _status(exit_status: int | None) -> str:
    if exit_status is not None and exit_status < 0:
        return f"signal {-exit_status} ({signal.Signals(-exit_status).name}: {_meaning(-exit_status)})"
    return f"status {exit_status}"


def _meaning(number: int) -> str:
    return "perhaps out of memory" if number == signal.SIGKILL else "killed"
