"""The job server of a Ray cluster over HTTP, spoken to with Ray's own client; its errors said in our words."""

import logging
import os
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.credentials import WAY_OUT, Token
from cluster.jobs import GRACE, OUTPUT, PYTHON, VERSION, JobFacts, Submission, moment, status_of
from pipeline.errors import ClusterUnreachable, ConfigError, SubmissionError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables of the environment that name a cluster; Ray's client lets them win over what it is told."""

ANSWER_SECONDS = 60.0
"""How long the server may be silent before a request counts as lost: it may have to start a process to answer."""


class _Client(JobSubmissionClient):
    """Ray's client, whose requests end: it would wait for ever on a connection that is dead."""

    def __init__(self, address: str, headers: dict[str, Any]) -> None:
        super().__init__(address, headers=headers)
        self._ssl_context = ssl.create_default_context()  # Ray's None means the same, and aiohttp warns of it

    def _do_request(  # type: ignore[override]  # Ray passes nothing more
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: dict[str, Any] | None = None
    ) -> requests.Response:
        return super()._do_request(method, endpoint, data=data, json_data=json_data, timeout=ANSWER_SECONDS)


class RayJobs:
    """A `JobServer`. `address`: as `server_url` returns it."""

    def __init__(self, address: str, token: Token | None) -> None:
        self._address, self._token = address, token
        headers = {"Authorization": f"Bearer {token.value}"} if token else {}
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every package and socket
        with self._told(), _only_as_told():
            self._client = _Client(address, headers)

    @property
    def address(self) -> str:
        """The URL it answers at."""
        return self._address

    def submit(self, submission: Submission) -> None:
        """Send what the job needs, and hand it over; raises what `JobServer` says."""
        environment: dict[str, Any] = {
            "env_vars": dict(submission.environment),
            "py_modules": [str(path) for path in submission.modules],
        }
        if submission.settings is not None:
            environment["working_dir"] = str(submission.settings)
        if submission.install:
            environment["pip"] = {"packages": list(submission.install), "pip_check": False}
        with self._told():
            self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.job,
                runtime_env=environment,
                metadata=dict(submission.metadata),
                entrypoint_num_cpus=submission.cpus,
                entrypoint_num_gpus=submission.gpus,
                entrypoint_label_selector={"ray.io/node-id": submission.node} if submission.node else None,
            )

    def jobs(self) -> Sequence[JobFacts]:
        """Return all jobs that secateur has submitted, the latest first."""
        with self._told():
            found = self._client.list_jobs()
        ours = [_facts(details) for details in found if VERSION in (details.metadata or {})]
        return sorted(ours, key=lambda facts: facts.began.timestamp() if facts.began else 0.0, reverse=True)

    def facts(self, job: str) -> JobFacts:
        """Return what is known of one job."""
        with self._told():
            return _facts(self._client.get_job_info(job))

    def ask_stop(self, job: str) -> None:
        """Signal a job to stop."""
        with self._told():
            self._client.stop_job(job)

    def forget(self, job: str) -> None:
        """Take a job that is over out of the list."""
        with self._told():
            self._client.delete_job(job)

    def log(self, job: str) -> str:
        """Return what a job has written until now."""
        with self._told():
            return self._client.get_job_logs(job)

    async def tail(self, job: str) -> AsyncGenerator[str, None]:
        """Yield what a job has written, from the beginning, and what it writes until it is over."""
        with self._told():
            async for text in self._client.tail_job_logs(job):
                yield text

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in our words what goes wrong; nothing that is said holds the token."""
        try:
            yield
        except AuthenticationError as error:
            raise SubmissionError(self._refusal(str(error))) from None
        except (OSError, aiohttp.ClientError, requests.RequestException) as error:  # a ConnectionError is an OSError
            raise ClusterUnreachable(
                f"no Ray job server answers at {self._address} ({_first_line(error)}); it is the dashboard of the "
                "cluster's head, http://HEAD:8265 unless told otherwise (`ray start --head --dashboard-host=0.0.0.0`)"
            ) from None
        except RuntimeError as error:
            if "WebSocket" in str(error):
                raise ClusterUnreachable(f"the connection to {self._address} was lost ({_first_line(error)})") from None
            raise SubmissionError(f"the Ray job server at {self._address} refuses: {_first_line(error)}") from None

    def _refusal(self, told: str) -> str:
        if self._token is None:
            how = "RAY_AUTH_MODE=disabled keeps it back" if _switched_off(os.environ) else "there is none here"
            return f"the cluster at {self._address} asks for a token, and {how}; {WAY_OUT}"
        if told.startswith("Authentication failed"):
            return f"the cluster at {self._address} does not take the token in {self._token.origin}; {WAY_OUT}"
        return f"the cluster at {self._address} saw no token, though {self._token.origin} was sent: look at proxies"


def server_url(given: str | None, environment: Mapping[str, str]) -> str:
    """Return the URL of a cluster's job server from what the user gave, or else from the environment.

    Raises ConfigError where there is none, or where it is an address of another kind.
    """
    named = given or next((environment[name] for name in ADDRESSES if environment.get(name)), None)
    if named is None:
        raise ConfigError("which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    address = named if "://" in named else f"http://{named}"
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(f"the address of the cluster is no URL: {error}") from None
    if parts.username or parts.password:
        raise ConfigError("the address of a cluster holds no user and password, which would be shown; use a token")
    if parts.scheme not in ("http", "https") or not parts.hostname or named in ("auto", "local"):
        raise ConfigError(f"{named!r} is not the URL of a Ray job server, such as http://HEAD:8265 (the dashboard's)")
    return address.rstrip("/")


@contextmanager
def _only_as_told() -> Iterator[None]:
    """Keep Ray's client from taking another address than it is told."""
    kept = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _facts(details: JobDetails) -> JobFacts:
    metadata = details.metadata or {}
    return JobFacts(
        job=details.submission_id or details.job_id or "",
        status=status_of(details.status.value, details.driver_exit_code),
        output=metadata.get(OUTPUT, ""),
        began=moment(details.start_time),
        ended=moment(details.end_time),
        exit_status=details.driver_exit_code,
        message=details.message or "",
        grace=_seconds(metadata.get(GRACE, "")),
        python=metadata.get(PYTHON, "python"),
        node=details.driver_node_id,
    )


def _seconds(text: str) -> float:
    """Return a number that a person may have written, in a manifest; 0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _switched_off(environment: Mapping[str, str]) -> bool:
    return environment.get("RAY_AUTH_MODE", "").lower() == "disabled"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
