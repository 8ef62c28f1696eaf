"""What the files of the `secateur` command share: options, exit statuses, signals, the console, the JSON object."""

import json
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

EXIT_ERROR = 1

console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Override = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")]


def emit(as_json: bool, content: dict[str, Any]) -> None:
    """Print the one JSON object, if it was asked for."""
    if as_json:
        sys.stdout.write(json.dumps(content) + "\n")


def say(text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class StoppedAtOnce(BaseException):
    """A second signal. Not a KeyboardInterrupt, of which typer makes an exit status of its own."""


STOPPING = "stopping once this block is committed; once more to stop at once (the block is then lost)"


def stop_on_signals(told: str = STOPPING) -> Callable[[], bool]:
    """Return a question that turns true at the first SIGINT or SIGTERM, when the user is told what will happen.

    A second signal ends the process at once.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise StoppedAtOnce
        asked.append(number)
        console.print(told, soft_wrap=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: bool(asked)
