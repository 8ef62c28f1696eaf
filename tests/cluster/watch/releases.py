"""Releases, policies and a clock for tests that need no files."""

from dataclasses import dataclass, replace
from typing import Any

from cluster.watch.lifecycle import Found, Release, RetryPolicy, begin
from cluster.watch.state import Limits

POLICY = RetryPolicy(attempts=3, first_wait=60.0, longest_wait=3600.0, interruptions=2)
ONE_AT_A_TIME = Limits(jobs=1, disk_bytes=None)
MANY = Limits(jobs=100, disk_bytes=None)


@dataclass(slots=True)
class Clock:
    """A clock that is set by hand."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def found(name: str = "acme/tiny", revision: str = "1" * 40, **changes: Any) -> Found:
    """Return a release as a source shows it."""
    facts = {"licence": "apache-2.0", "architectures": ["LlamaForCausalLM"], "changed": 999_000.0}
    plain = Found(name=name, revision=revision, origin="hub", num_bytes=100, disk_bytes=200, facts=facts)
    return replace(plain, **changes)


def release(**changes: Any) -> Release:
    """Return a release that was just found."""
    return replace(begin(1, found(), "", 0.0), **changes)
