"""Jobs handed to a Ray cluster: submitted with our own code, stopped at the next safe point, and firmly after that.

A job is `secateur run` on the cluster's head, or where it is given CPUs or GPUs; the workers of its `cluster` section
are Ray actors as ever. It does not need the client that submitted it. Submitted again, it goes on from its run
directory, which lies on the machine where it runs.
"""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cluster.credentials import refuse_secrets
from cluster.jobs import GRACE, OUTPUT, PYTHON, VERSION, JobFacts, JobServer, Submission, new_name
from cluster.package import own_distribution, stage
from pipeline.errors import ClusterUnreachable, SubmissionError
from pipeline.progress import Say

NEVER_INSTALLED = ("ray",)
"""What a job takes from the cluster as it is: Ray of another version would not be part of it."""

POLL_SECONDS = 1.0

LATE_SECONDS = 60.0
"""How long beyond its grace a job that was asked to stop may take to be seen as over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How a job is to run."""

    grace: float = 3600.0
    """Seconds it may take to come to a safe point once it is asked to stop; then it is killed."""

    cpus: float | None = None
    gpus: float | None = None
    """Resources of its first process; on the head, without any of its own, when both are absent."""

    python: str = "python"
    """The interpreter on the cluster."""

    install: bool = False
    """Whether the cluster is to install what the job needs, in the versions that are installed here."""


def submit(server: JobServer, settings: dict[str, Any], wishes: Wishes, say: Say) -> str:
    """Hand a run to a cluster, by its resolved configuration as plain data, and return the name of the job.

    Raises ConfigError where the settings hold a secret, SubmissionError where a job of the same run directory is not
    over yet, or the cluster refuses.
    """
    text, output = _settings_there(settings, say), settings["output"]
    refuse_secrets(text, os.environ)
    _refuse_second(server.jobs(), output)
    job = new_name(Path(output))
    with TemporaryDirectory(prefix="secateur-") as directory:
        package = stage(Path(directory), text)
        installed = [pin for pin in package.pins if pin.partition("==")[0] not in NEVER_INSTALLED]
        submission = Submission(
            job=job,
            entrypoint=_entrypoint(wishes.python, "run", job),
            metadata={
                VERSION: own_distribution().version, OUTPUT: output, GRACE: f"{wishes.grace:g}",
                PYTHON: wishes.python,
            },
            environment={"RAY_JOB_STOP_WAIT_TIME_S": f"{wishes.grace:.0f}"},
            modules=package.modules, settings=package.settings,
            install=tuple(installed) if wishes.install else (),
            cpus=wishes.cpus, gpus=wishes.gpus,
        )  # fmt: skip
        _submit_once(server, submission)
    return job


def stop(server: JobServer, job: str, say: Say, *, at_once: bool = False) -> JobFacts:
    """Stop a job: after the block at hand, or at once; return what is known of it once it is over.

    Every committed block is kept either way. Raises SubmissionError where it is not over in time.
    """
    facts = server.facts(job)
    if facts.is_over:
        say(f"{job} is over already: {facts.status}")
        return facts
    server.ask_stop(job)
    if at_once:
        return _stopped_at_once(server, facts, say)
    say(
        f"{job} stops once the block at hand is committed, at the latest in {facts.grace:g} s; "
        f"`secateur stop {job} --now` does not wait for the block"
    )
    return _wait(server, job, facts.grace + LATE_SECONDS)


def explain(facts: JobFacts) -> str:
    """Say how a job has ended, and how it goes on."""
    if facts.status == "succeeded":
        return f"{facts.job} has succeeded; its model is in {facts.output}/model on the cluster"
    again = f"submit the same configuration again, and it goes on from what is committed in {facts.output}"
    if facts.status == "stopped":
        return f"{facts.job} was stopped: {again}"
    # Ray's message ends with the last lines of the log, which were shown or are at hand
    reason = facts.message.strip().splitlines()[0] if facts.message.strip() else "no reason was given"
    return f"{facts.job} has {facts.status}: {reason}\n`secateur logs {facts.job}` shows more; once mended, {again}"


def _settings_there(settings: dict[str, Any], say: Say) -> str:
    """Return the settings as the job is to read them: it belongs to the cluster it is submitted to."""
    cluster = settings.get("cluster")
    if cluster is None:
        say(
            "the settings have no `cluster` section: one process does all, on the head unless --cpus or --gpus is given"
        )
    elif cluster["address"] != "auto":
        say(f"cluster.address is {cluster['address']}; a submitted job takes the cluster it is submitted to")
        settings = {**settings, "cluster": {**cluster, "address": "auto"}}
    text: str = yaml.safe_dump(settings, sort_keys=False)
    return text


def _refuse_second(jobs: Sequence[JobFacts], output: str) -> None:
    for facts in jobs:
        if facts.output == output and not facts.is_over:
            raise SubmissionError(
                f"{facts.job} is {facts.status} in {output}, and one job at a time may work there; follow it with "
                f"`secateur logs {facts.job} --follow`, or stop it with `secateur stop {facts.job}`"
            )


def _submit_once(server: JobServer, submission: Submission) -> None:
    """Submit; where the answer is lost, look whether the job was taken, rather than submit it twice."""
    try:
        server.submit(submission)
    except ClusterUnreachable as error:
        try:
            server.facts(submission.job)
        except SubmissionError:
            raise ClusterUnreachable(
                f"{error.message}\nwhether {submission.job} was taken on is not known: see `secateur list` before "
                "submitting again"
            ) from None


def _stopped_at_once(server: JobServer, facts: JobFacts, say: Say) -> JobFacts:
    """End a job's process by another job beside it: Ray signals a job once, and then waits for it."""
    say(f"{facts.job} stops now; the block at hand is lost, every committed block is kept")
    with TemporaryDirectory(prefix="secateur-") as directory:
        ending = Submission(
            job=f"{facts.job}-end-{time.time_ns():x}",
            entrypoint=_entrypoint(facts.python, "end", facts.job),
            metadata={},
            environment={},
            modules=stage(Path(directory), "").modules,
            settings=None,
            node=facts.node,
        )
        _submit_once(server, ending)
    ended = _wait(server, ending.job, LATE_SECONDS)
    server.forget(ending.job)
    if ended.status != "succeeded" and not server.facts(facts.job).is_over:
        raise SubmissionError(
            f"{facts.job} was asked to stop, but its process was not found to be ended at once; it ends after the "
            f"block at hand, at the latest in {facts.grace:g} s"
        )
    return _wait(server, facts.job, LATE_SECONDS)


def _wait(server: JobServer, job: str, seconds: float) -> JobFacts:
    """Wait until a job is over."""
    end = time.monotonic() + seconds
    while not (facts := server.facts(job)).is_over:
        if time.monotonic() > end:
            raise SubmissionError(
                f"{job} is still {facts.status} after {seconds:g} s; a job that is pending waits for resources or for "
                "its packages, and one that runs can be ended with `secateur stop --now`"
            )
        time.sleep(POLL_SECONDS)
    return facts


def _entrypoint(python: str, task: str, job: str) -> str:
    return f"exec {shlex.quote(python)} -m cluster.entry {task} {job}"
