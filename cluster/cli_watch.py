"""The commands about new releases: watch, watch status, watch retry."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.cli_jobs import connect
from cluster.cli_shared import Json, StoppedAtOnce, console, emit, stop_on_signals
from cluster.jobs import EXIT_STOPPED


class RunsByDefault(TyperGroup):
    """A group whose first word may be an argument: then it is its command `run` that is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before what is no command's name."""
        named = not args or args[0] in self.commands or args[0] == "--help"
        parsed: list[str] = super().parse_args(ctx, args if named else ["run", *args])
        return parsed


watching = typer.Typer(
    cls=RunsByDefault,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune new releases as they appear: `secateur watch CONFIG [--once]`.",
)

STOPPING = (
    "stopping once the blocks or checks at hand are done (jobs of a cluster go on without the watcher); once more to "
    "stop at once"
)

WatchFile = Annotated[Path, typer.Argument(help="A watch configuration.")]


@watching.command("run", hidden=True)
def watch_run(
    config: WatchFile,
    once: Annotated[bool, typer.Option("--once", help="Look once, do what is due, and end.")] = False,
) -> None:
    """Ask the sources on a schedule; plan, fetch, prune, gate and publish what is new."""
    from cluster.run import run_anywhere
    from cluster.watch.command import watch

    try:
        watch(config, console, run_anywhere, connect, stop_on_signals(STOPPING), once=once)
    except StoppedAtOnce:
        console.print("interrupted; the same command goes on from here", soft_wrap=True)
        os._exit(EXIT_STOPPED)  # an ordinary exit would wait for the threads at work


@watching.command("status")
def watch_status(config: WatchFile, as_json: Json = False) -> None:
    """Show every release that was seen, and what became of it."""
    from cluster.watch.command import status

    emit(as_json, status(config, console))


@watching.command("retry")
def watch_retry(config: WatchFile, model: Annotated[str, typer.Argument(help="Its name, as status shows it.")]) -> None:
    """Give a model's quarantined and skipped revisions another chance."""
    from cluster.watch.command import retry

    retry(config, model, console)
