"""News to a webhook: each is delivered at least once, or given up after many tries; its address is never said."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException

from cluster.watch.config import WebhookConfig
from cluster.watch.rows import Notice
from cluster.watch.state import State
from pipeline.errors import ConfigError

TIMEOUT_SECONDS = 10.0
MOST_TRIES = 10
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 3600.0


def address_of(webhook: WebhookConfig) -> str:
    """Return where news goes; raises ConfigError where it is not said or is no web address."""
    address = webhook.url or os.environ.get(webhook.url_from or "", "")
    if not address.startswith(("http://", "https://")):
        where = "webhook.url" if webhook.url else f"the environment variable {webhook.url_from} (webhook.url_from)"
        raise ConfigError(f"{where} holds no http:// or https:// address")
    return address


def deliver(webhook: WebhookConfig | None, state: State, say: Callable[[str], None]) -> None:
    """Tell what is to be told now; what is not wanted is forgotten."""
    now = state.clock()
    for notice in state.notices():
        if webhook is None or notice.body["event"] not in webhook.events:
            state.told(notice)
            continue
        if not notice.is_due(now, _LONGEST_WAIT):
            continue
        problem = _post(address_of(webhook), notice)
        if not problem:
            state.told(notice)
        elif notice.tries + 1 >= MOST_TRIES:
            say(f"the webhook could not be told of {notice.body['model']} in {MOST_TRIES} tries: {problem}; given up")
            state.told(notice)
        else:
            state.tell_later(notice, now + min(_LONGEST_WAIT, _FIRST_WAIT * 2**notice.tries))


def _post(address: str, notice: Notice) -> str:
    """Send one notice as JSON; say what went wrong, if anything did, without the address."""
    body = {**notice.body, "id": notice.number}
    body["text"] = (
        f"secateur: {body['model']}@{body['revision'][:12]} {body['event']} {body['location'] or body['reason']}"
    )
    headers = {"Content-Type": "application/json", "User-Agent": "secateur"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        return type(error).__name__
