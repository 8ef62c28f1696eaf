"""Addresses of job servers, and what is said of one that is not there or answers strangely."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster import job_client
from cluster.credentials import Token
from cluster.job_client import RayJobs, server_url
from cluster.jobs import GRACE
from pipeline.errors import ClusterUnreachable, ConfigError, SubmissionError

TOKEN = Token(value="0123456789abcdef", origin="RAY_AUTH_TOKEN")


class Strange(BaseHTTPRequestHandler):
    """A server that says it is Ray's, and to all else what the test says."""

    answer: ClassVar[tuple[int, Any]] = (200, [])
    seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        status, content = (200, version) if self.path == "/api/version" else self.answer
        self.seen.append(self.headers.get("Authorization"))
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Strange, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("given", "environment", "url"),
    [
        ("http://head:8265/", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("head:8265", {}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://head", "RAY_ADDRESS": "http://other:1"}, "https://head"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
    ],
)
def test_the_address_that_is_given_wins_over_the_environment(
    given: str | None, environment: dict[str, str], url: str
) -> None:
    assert server_url(given, environment) == url


@pytest.mark.parametrize("named", ["auto", "local", "ray://head:10001", "http://", "ftp://head"])
def test_an_address_of_another_kind_is_refused(named: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{named}' is not the URL of a Ray job server, such as http://HEAD:8265"):
        server_url(named, {})


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="the address of the cluster is no URL: Invalid IPv6 URL"):
        server_url("http://[::1", {})


@pytest.mark.parametrize(("written", "seconds"), [("1800", 1800.0), ("30m", 0.0), ("", 0.0)])
def test_a_grace_that_a_person_has_written_amiss_does_not_hide_the_other_jobs(written: str, seconds: float) -> None:
    details = JobDetails(type=JobType.SUBMISSION, status=JobStatus.RUNNING, entrypoint="", metadata={GRACE: written})
    assert job_client._facts(details).grace == seconds


def test_without_an_address_both_ways_to_give_one_are_named() -> None:
    with pytest.raises(ConfigError, match=r"which cluster\? give --address http://HEAD:8265, or set RAY_API_SERVER"):
        server_url(None, {"RAY_ADDRESS": ""})


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"holds no user and password") as caught:
        server_url("https://me:sesame@head", {})
    assert "sesame" not in caught.value.message


def test_nothing_at_the_address_is_said_with_what_should_be_there() -> None:
    with pytest.raises(ClusterUnreachable, match=r"no Ray job server answers at http://127.0.0.1:1 .*dashboard-host"):
        RayJobs("http://127.0.0.1:1", None)


def test_the_token_is_sent_with_every_request(address: str) -> None:
    assert RayJobs(address, TOKEN).jobs() == []
    assert set(Strange.seen) == {f"Bearer {TOKEN.value}"}


def test_a_refusal_is_told_in_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RayJobs(address, None)
    monkeypatch.setattr(Strange, "answer", (500, "Traceback\nand more"))
    with pytest.raises(
        SubmissionError, match=rf"the Ray job server at {address} refuses: .*status code 500: Traceback$"
    ):
        server.facts("secateur-a-1")


def test_a_token_that_a_proxy_takes_away_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RayJobs(address, TOKEN)
    monkeypatch.setattr(Strange, "answer", (401, "Unauthorized: Missing authentication token"))
    with pytest.raises(SubmissionError, match=r"saw no token, though RAY_AUTH_TOKEN was sent: look at proxies"):
        server.jobs()


def test_a_connection_that_is_silent_counts_as_lost(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RayJobs(address, None)
    monkeypatch.setattr(job_client, "ANSWER_SECONDS", 0.05)
    release = threading.Event()
    monkeypatch.setattr(Strange, "do_GET", lambda handler: release.wait(10))
    try:
        with pytest.raises(ClusterUnreachable, match=r"Read timed out"):
            server.jobs()
    finally:
        release.set()
