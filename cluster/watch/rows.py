"""How the state file stores what the watcher knows: its tables, and a release as a row."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from cluster.watch.lifecycle import Found, Release

VERSION = 1

SCHEMA = """
CREATE TABLE releases (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    status TEXT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (name, revision)
);
CREATE INDEX by_status ON releases (status);
CREATE TABLE attempts (
    number INTEGER PRIMARY KEY,
    release INTEGER NOT NULL REFERENCES releases (number),
    owner TEXT NOT NULL,
    began REAL NOT NULL,
    ended REAL,
    step TEXT NOT NULL,
    outcome TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE sources (name TEXT PRIMARY KEY, checked REAL NOT NULL, error TEXT NOT NULL);
CREATE TABLE notices (number INTEGER PRIMARY KEY, body TEXT NOT NULL, due REAL NOT NULL, tries INTEGER NOT NULL)
"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a release."""

    release: int
    owner: str
    began: float
    ended: float | None
    step: str
    """Where it began; once it has ended, how far it came."""

    outcome: str
    """`published`, `failed`, `skipped`, `quarantined`, `stopped`, `interrupted`, or empty while it goes on."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """When a source was last asked, and what went wrong if something did."""

    name: str
    checked: float
    error: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to be told to others."""

    number: int
    body: dict[str, Any]
    due: float
    tries: int

    def is_due(self, now: float, longest_wait: float) -> bool:
        """Whether it is to be told now; one that seems further off than any wait comes of a clock that was set back."""
        return not now < self.due <= now + longest_wait


def to_row(release: Release) -> tuple[str, str, int]:
    """Return a release's columns that change, and its number."""
    body = asdict(release)
    for column in ("number", "status"):
        del body[column]
    return release.status, json.dumps(body), release.number


def from_row(row: tuple[int, str, str, str, str]) -> Release:
    """Return the release that a row holds."""
    number, _, _, status, body = row
    fields = json.loads(body)
    found = Found(**fields.pop("found"))
    return Release(number=number, status=status, found=found, **fields)  # type: ignore[arg-type]  # one that was written
