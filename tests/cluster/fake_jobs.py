"""A job server in memory for tests: jobs move on as the test says, and connections are lost when it says so."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from cluster.jobs import GRACE, OUTPUT, PYTHON, JobFacts, Status, Submission
from pipeline.errors import ClusterUnreachable, SubmissionError


def some_facts(job: str = "secateur-a-1", status: Status = "running", output: str = "/runs/a") -> JobFacts:
    """Facts of a job."""
    return JobFacts(
        job=job, status=status, output=output, began=datetime(2026, 11, 22, tzinfo=UTC), ended=None, exit_status=None,
        message="", grace=5.0, python="python", node="node-1",
    )  # fmt: skip


class FakeJobs:
    """A `JobServer`; `on_poll` is called before each answer about a job, and may change what there is."""

    address = "http://head:8265"

    def __init__(self, *facts: JobFacts, on_poll: Callable[["FakeJobs"], object] = lambda server: None) -> None:
        self.known = {each.job: each for each in facts}
        self.submitted: list[Submission] = []
        self.asked: list[str] = []
        self.forgotten: list[str] = []
        self.on_poll = on_poll
        self.pieces: list[str | Exception] = []
        """What each tail yields in turn; an exception loses the connection."""

        self.lose: Exception | None = None
        """Raised once a submission was taken in."""

    def submit(self, submission: Submission) -> None:
        self.submitted.append(submission)
        metadata = submission.metadata
        facts = some_facts(submission.job, "succeeded" if " end " in submission.entrypoint else "pending")
        facts = replace(facts, output=metadata.get(OUTPUT, ""), python=metadata.get(PYTHON, "python"))
        self.known[submission.job] = replace(facts, grace=float(metadata.get(GRACE, 0)))
        if self.lose is not None:
            raise self.lose

    def jobs(self) -> Sequence[JobFacts]:
        return list(self.known.values())

    def facts(self, job: str) -> JobFacts:
        self.on_poll(self)
        if job not in self.known:
            raise SubmissionError(f"no job {job}")
        return self.known[job]

    def ask_stop(self, job: str) -> None:
        self.asked.append(job)

    def forget(self, job: str) -> None:
        self.forgotten.append(job)

    def log(self, job: str) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    async def tail(self, job: str) -> AsyncGenerator[str, None]:
        while self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            if piece == "end of the log":
                return
            yield piece
        await asyncio.sleep(3600)  # a connection on which nothing comes any more

    def finish(self, job: str, status: Status, exit_status: int | None = None, message: str = "") -> None:
        """Let a job be over."""
        self.known[job] = replace(self.known[job], status=status, exit_status=exit_status, message=message)


LOST = ClusterUnreachable("the connection to http://head:8265 was lost")
