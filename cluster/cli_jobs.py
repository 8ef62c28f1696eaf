"""The commands about jobs on a Ray cluster: submit, status, logs, stop, list; what prunes is not imported for them."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_shared import EXIT_ERROR, Json, Override, emit, say
from cluster.credentials import ray_token
from cluster.follow import follow
from cluster.jobs import EXIT_STOPPED, JobFacts, JobServer, find
from cluster.submit import Wishes, explain
from cluster.submit import stop as stop_job
from cluster.submit import submit as submit_run
from pipeline.errors import ConfigError
from pipeline.human import human_seconds

EXIT_LEFT = 130
"""The client was interrupted; the job was not."""

jobs = typer.Typer()

Address = Annotated[
    str | None, typer.Option(help="URL of the cluster's job server, http://HEAD:8265; or RAY_API_SERVER_ADDRESS.")
]
Job = Annotated[str, typer.Argument(help="A job's name, or enough of its beginning or end.")]


@jobs.command()
def submit(
    config: Annotated[Path, typer.Argument(help="A configuration; its paths are the cluster's.")],
    address: Address = None,
    overrides: Override = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job, nor show its log.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds from `stop` to being killed; a block may take it.")
    ] = 3600,
    cpus: Annotated[float | None, typer.Option(min=0, help="CPUs of the job's first process.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of it: 1 for a job without workers.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter on the cluster.")] = "python",
    install: Annotated[bool, typer.Option("--install", help="Let the cluster install what is needed.")] = False,
    as_json: Json = False,
) -> None:
    """Run a configuration as a job of a Ray cluster, with the code installed here; goes on where it was stopped."""
    from pipeline.config import load_config, resolved

    settings = load_config(config, overrides or [])
    server = connect(address)
    wishes = Wishes(grace=grace, cpus=cpus, gpus=gpus, python=python, install=install)
    job = submit_run(server, resolved(settings), wishes, say)
    say(f"submitted {job} to {server.address}; its run directory there is {settings.output}")
    if detach:
        say(f"follow it with: secateur logs {job} --follow --address {server.address}")
        emit(as_json, server.facts(job).as_json())
        return
    facts = followed(server, job, to_stdout=False)
    say(explain(facts))
    emit(as_json, facts.as_json())
    raise typer.Exit(exit_status(facts))


@jobs.command()
def status(job: Job, address: Address = None, as_json: Json = False) -> None:
    """Say how a job is, and what it said last."""
    server = connect(address)
    facts = find(server.jobs(), job)
    show_jobs([facts])
    last = server.log(facts.job).strip().rpartition("\n")[2]
    say(explain(facts) if facts.is_over else last)
    emit(as_json, {**facts.as_json(), "last": last})


@jobs.command()
def logs(
    job: Job,
    address: Address = None,
    go_on: Annotated[bool, typer.Option("--follow", "-f", help="Show what comes until the job is over.")] = False,
) -> None:
    """Show what a job has written."""
    server = connect(address)
    name = find(server.jobs(), job).job
    if not go_on:
        sys.stdout.write(server.log(name))
        return
    facts = followed(server, name, to_stdout=True)
    say(explain(facts))
    raise typer.Exit(exit_status(facts))


@jobs.command()
def stop(
    job: Job,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the block at hand; it is lost.")] = False,
    as_json: Json = False,
) -> None:
    """Stop a job once the block at hand is committed, and wait for that; submitted again it goes on from there."""
    server = connect(address)
    name = find(server.jobs(), job).job
    try:
        facts = stop_job(server, name, say, at_once=now)
    except KeyboardInterrupt:
        say(f"not waiting; {name} was asked to stop, and will")
        raise typer.Exit(EXIT_LEFT) from None
    say(explain(facts))
    emit(as_json, facts.as_json())


@jobs.command("list")
def list_jobs(address: Address = None, as_json: Json = False) -> None:
    """List the jobs that secateur has submitted to a cluster, the latest first."""
    found = connect(address).jobs()
    show_jobs(found)
    emit(as_json, {"jobs": [facts.as_json() for facts in found]})


def connect(address: str | None) -> JobServer:
    """Return the job server at an address, or at the one in the environment."""
    if find_spec("ray") is None:
        raise ConfigError("jobs on a cluster need ray, which is not installed; pip install 'secateur[cluster]'")
    from cluster.job_client import RayJobs, server_url

    return RayJobs(server_url(address, os.environ), ray_token(os.environ, Path.home()))


def followed(server: JobServer, job: str, *, to_stdout: bool) -> JobFacts:
    """Show a job's log until it is over; a Ctrl-C leaves the job alone, and ends this command."""

    def show(text: str) -> None:
        stream = sys.stdout if to_stdout else sys.stderr
        stream.write(text)
        stream.flush()

    try:
        return follow(server, job, show, say)
    except KeyboardInterrupt:
        way_back = f"secateur logs {job} --follow --address {server.address}"
        say(f"\n{job} goes on without this command; follow it with `{way_back}`, stop it with `secateur stop {job}`")
        raise typer.Exit(EXIT_LEFT) from None


def exit_status(facts: JobFacts) -> int:
    """Return the exit status of `secateur run` there, as far as it is known."""
    if facts.status == "stopped":
        return EXIT_STOPPED
    return 0 if facts.status == "succeeded" else facts.exit_status or EXIT_ERROR


def show_jobs(found: Sequence[JobFacts]) -> None:
    """Print one job a line, never wrapped or cut: names are what other commands take."""
    rows = [("job", "status", "since", "took", "run directory"), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(facts: JobFacts) -> tuple[str, str, str, str, str]:
    if facts.began is None:
        return facts.job, facts.status, "", "", facts.output
    seconds = ((facts.ended or datetime.now(UTC)) - facts.began).total_seconds()
    return facts.job, facts.status, f"{facts.began:%Y-%m-%d %H:%M} UTC", human_seconds(seconds), facts.output
