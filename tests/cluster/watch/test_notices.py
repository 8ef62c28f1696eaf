"""News to a webhook, a server of this machine: delivered, tried again, given up, and never told with its address."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.watch import lifecycle
from cluster.watch.config import WebhookConfig
from cluster.watch.notices import MOST_TRIES, address_of, deliver
from cluster.watch.state import State
from pipeline.errors import ConfigError
from tests.cluster.watch.releases import MANY, POLICY, Clock, found

SECRET = "/hooks/a-secret"


class Listener:
    """A server that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.status = 200
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.told.append({"path": self.path, **json.loads(body)})
                self.send_response(listener.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}{SECRET}"


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    thread = threading.Thread(target=listener.server.serve_forever, args=(0.02,))
    thread.start()
    yield listener
    listener.server.shutdown()
    thread.join()
    listener.server.server_close()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> State:
    """A state in which one release was published and one skipped by its plan."""
    state = State(tmp_path / "state.db", clock)
    for name in ("acme/good", "acme/large"):
        state.note(found(name=name), "")
    for change in (
        lambda release, now: lifecycle.published(release, "there", now),
        lambda release, now: lifecycle.skipped(release, "plan: too large", now),
    ):
        claim = state.claim(MANY, POLICY)
        assert claim is not None
        state.change(claim, change)
        claim.let_go()
    return state


def test_wanted_news_is_delivered_once_and_the_rest_forgotten(state: State, listener: Listener) -> None:
    said: list[str] = []
    for _ in range(2):
        deliver(WebhookConfig(url=listener.address), state, said.append)
    (told,) = listener.told
    assert told["path"] == SECRET
    assert (told["event"], told["model"], told["location"], told["id"]) == ("published", "acme/good", "there", 1)
    assert told["text"] == "secateur: acme/good@111111111111 published there"
    assert (said, state.notices()) == ([], [])


def test_without_a_webhook_news_does_not_pile_up(state: State) -> None:
    deliver(None, state, pytest.fail)
    assert state.notices() == []


def test_news_that_cannot_be_delivered_is_tried_again_and_at_last_given_up(
    state: State, clock: Clock, listener: Listener
) -> None:
    listener.status = 500
    said: list[str] = []
    webhook = WebhookConfig(url=listener.address, events=("published", "skipped"))
    deliver(webhook, state, said.append)
    deliver(webhook, state, said.append)  # nothing is due yet
    assert len(listener.told) == 2
    for _ in range(MOST_TRIES - 1):
        clock.now += 3600
        deliver(webhook, state, said.append)
    assert (len(listener.told), state.notices()) == (2 * MOST_TRIES, [])
    assert said[0] == "the webhook could not be told of acme/good in 10 tries: status 500; given up"
    assert SECRET not in "".join(said)


def test_a_server_that_is_not_there_is_told_later(state: State, clock: Clock, listener: Listener) -> None:
    deliver(WebhookConfig(url="http://127.0.0.1:9/nobody"), state, pytest.fail)
    assert [notice.tries for notice in state.notices()] == [1]
    clock.now += 15
    deliver(WebhookConfig(url=listener.address), state, pytest.fail)
    assert [told["event"] for told in listener.told] == ["published"]


def test_a_server_that_speaks_no_http_is_told_later(state: State) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=talk_nonsense, args=(server,))
        thread.start()
        deliver(WebhookConfig(url=f"http://127.0.0.1:{server.getsockname()[1]}{SECRET}"), state, pytest.fail)
        thread.join()
    assert [notice.tries for notice in state.notices()] == [1]


def talk_nonsense(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65_536)
        connection.sendall(b"nonsense\r\n\r\n")


def test_a_secret_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    webhook = WebhookConfig(url_from="WATCH_HOOK")
    monkeypatch.setenv("WATCH_HOOK", "https://example.org/secret")
    assert address_of(webhook) == "https://example.org/secret"
    monkeypatch.delenv("WATCH_HOOK")
    with pytest.raises(ConfigError, match=r"the environment variable WATCH_HOOK \(webhook.url_from\) holds no http://"):
        address_of(webhook)
    with pytest.raises(ConfigError, match=r"webhook\.url holds no http:// or https:// address"):
        address_of(WebhookConfig(url="file:///etc/passwd"))
