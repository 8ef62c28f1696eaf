"""What the files of the `secateur` command share: options, exit statuses, the console, the one JSON object."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

EXIT_ERROR, EXIT_REFUSED, EXIT_STOPPED = 1, 3, 75
"""75 (EX_TEMPFAIL): stopped as asked; the same command goes on."""

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
