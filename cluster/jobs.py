"""Jobs on a Ray cluster as values, and what is asked of the server that keeps them. Knows no Ray."""

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, Protocol

from pipeline.errors import SubmissionError

Status = Literal["pending", "running", "stopped", "succeeded", "failed"]

OVER: frozenset[Status] = frozenset({"stopped", "succeeded", "failed"})
EXIT_REFUSED, EXIT_STOPPED = 3, 75
"""Exit statuses of a run whose memory ceilings do not suffice, and of one that stopped as asked (EX_TEMPFAIL): the same
command goes on."""

VERSION, OUTPUT, GRACE, PYTHON = "secateur", "secateur_output", "secateur_grace", "secateur_python"
"""Names in a job's metadata: our version, the run directory, seconds to a stop that is firm, the interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as it is handed to the server."""

    job: str
    entrypoint: str
    metadata: Mapping[str, str]
    environment: Mapping[str, str]
    modules: tuple[Path, ...]
    settings: Path | None
    install: tuple[str, ...] = ()
    """Requirements the cluster is to install for the job, beyond what it has."""

    cpus: float | None = None
    gpus: float | None = None
    node: str | None = None
    """Id of the node it must run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the server tells of a job."""

    job: str
    status: Status
    output: str
    """The run directory, on the machine where the job runs."""

    began: datetime | None
    ended: datetime | None
    exit_status: int | None
    message: str
    grace: float
    """Seconds from being asked to stop to being killed."""

    python: str
    """The interpreter that runs it."""

    node: str | None
    """Id of the node it runs on, once it does."""

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in OVER

    def as_json(self) -> dict[str, Any]:
        """Return plain data; times in ISO format."""
        times = {name: time and time.isoformat() for name, time in (("began", self.began), ("ended", self.ended))}
        shown = {"job": self.job, "status": self.status, "output": self.output, **times}
        return {**shown, "exit_status": self.exit_status, "message": self.message}


class JobServer(Protocol):
    """What keeps jobs. Everything raises SubmissionError where it refuses, ClusterUnreachable where it is silent."""

    @property
    def address(self) -> str:
        """The URL it answers at."""

    def submit(self, submission: Submission) -> None:
        """Take a job on."""

    def jobs(self) -> Sequence[JobFacts]:
        """Return all jobs that secateur has submitted, the latest first."""

    def facts(self, job: str) -> JobFacts:
        """Return what is known of one job."""

    def ask_stop(self, job: str) -> None:
        """Signal a job to stop (SIGTERM), and kill it once its grace is over."""

    def forget(self, job: str) -> None:
        """Take a job that is over out of the list."""

    def log(self, job: str) -> str:
        """Return what a job has written until now."""

    def tail(self, job: str) -> AsyncGenerator[str, None]:
        """Yield what a job has written, from the beginning, and what it writes until it is over."""


def new_name(output: Path) -> str:
    """Return a new name for a job, which tells its run directory's."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", output.name).strip("-")[:40]
    return "-".join(part for part in ("secateur", readable, token_hex(4)) if part)


def find(jobs: Sequence[JobFacts], name: str) -> JobFacts:
    """Return the one job whose name is, or begins or ends with, what was given; raises SubmissionError."""
    exact = [facts for facts in jobs if facts.job == name]
    found = exact or [facts for facts in jobs if name and (facts.job.startswith(name) or facts.job.endswith(name))]
    if len(found) == 1:
        return found[0]
    known = ", ".join(facts.job for facts in (found or jobs)[:5])
    if found:
        raise SubmissionError(f"{len(found)} jobs go by {name!r} ({known}): give more of the name")
    raise SubmissionError(
        f"the cluster has no job {name!r} of secateur; "
        + (f"it has {known}" if jobs else "it has none at all, and forgets all when its head is started anew")
    )


def status_of(status: str, exit_status: int | None) -> Status:
    """Return a status of Ray's in our words; a run that was signalled otherwise than through Ray has stopped too."""
    lowered = status.lower()
    if lowered == "failed" and exit_status == EXIT_STOPPED:
        return "stopped"
    for known in ("pending", "running", *OVER):
        if lowered == known:
            return known
    raise SubmissionError(f"the cluster calls a job {status!r}, which this version does not know; install a newer one")


def moment(milliseconds: int | None) -> datetime | None:
    """Return a time as Ray counts it."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
