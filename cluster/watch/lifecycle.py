"""The life of a release, as pure functions: what may happen to it, and when it is due again.

    found ──take──> running ──published──> published
      │  ^            │ │ └──quarantined──> quarantined ──revive──> found
      │  └──stopped───┘ └────failed────> waiting ──take──> running
      └──skipped──> skipped ──(judged again, and wanted now)──> found

A release is one revision of one model. While it runs it passes the steps in order; the step it has reached is kept, so
that whoever takes it next goes on from there. Nothing here reads a clock or a file: `state` carries it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Status = Literal["found", "running", "waiting", "published", "skipped", "quarantined"]
Step = Literal["plan", "fetch", "prune", "gate", "publish"]

STEPS: tuple[Step, ...] = ("plan", "fetch", "prune", "gate", "publish")
OPEN: tuple[Status, ...] = ("found", "running", "waiting")
"""What is still to come to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A release as a source shows it."""

    name: str
    """`org/name` on the hub; the directory's name elsewhere."""

    revision: str
    """A commit of the hub, or what a directory's files hash to."""

    origin: str
    """`hub`, or the path of the directory."""

    num_bytes: int
    """Of its weights."""

    disk_bytes: int
    """That its work takes on disk, at most."""

    facts: Mapping[str, Any]
    """What else is known (plain data): licence, architectures, when it was last changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One revision of one model, and how far it has come. Times are seconds since 1970."""

    number: int
    found: Found
    status: Status
    step: Step
    failures: int
    """Attempts that failed since a step was last completed."""

    interruptions: int
    """Attempts whose process died, since a step was last completed."""

    due: float
    """When it may be taken."""

    reason: str
    """Why it waits, was skipped or is quarantined; empty otherwise."""

    location: str
    """Where it was published; empty otherwise."""

    results: Mapping[str, Any]
    """What its steps found out (plain data)."""

    found_at: float
    changed_at: float

    @property
    def label(self) -> str:
        """Name and revision, for people."""
        return f"{self.found.name}@{self.found.revision[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, and how soon, a failed release is tried again."""

    attempts: int
    """Attempts at one step, before it is quarantined."""

    first_wait: float
    """Seconds after the first failure; twice as long after each further one."""

    longest_wait: float
    interruptions: int
    """Deaths of the process within one step, before it is quarantined."""

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after so many failures."""
        return min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 60))


def begin(number: int, found: Found, refusal: str, now: float) -> Release:
    """Return a release that has just been seen: to be done, or skipped for a reason."""
    return Release(
        number=number, found=found, status="skipped" if refusal else "found", step=STEPS[0], failures=0,
        interruptions=0, due=now, reason=refusal, location="", results={}, found_at=now, changed_at=now,
    )  # fmt: skip


def judged_again(release: Release, refusal: str, now: float) -> Release:
    """Return a release that filters refused, as they judge it now; any other stays as it is.

    A refusal may end: the settings change, or a clock that was wrong is set right.
    """
    if release.status != "skipped" or release.results.get("planned") or refusal == release.reason:
        return release
    return replace(release, status="skipped" if refusal else "found", reason=refusal, due=now, changed_at=now)


def is_due(release: Release, now: float, policy: RetryPolicy) -> bool:
    """Whether a release may be taken: it is open, and its wait is over.

    A wait that would last longer than any wait does comes of a clock that was set back, and is over too.
    """
    return release.status in OPEN and not now < release.due <= now + policy.longest_wait


def taken(release: Release, policy: RetryPolicy, now: float) -> Release:
    """Return a release that somebody begins to work on; one that still `runs` lost its process before."""
    if release.status != "running":
        return replace(release, status="running", changed_at=now)
    interruptions = release.interruptions + 1
    if interruptions <= policy.interruptions:
        return replace(release, interruptions=interruptions, changed_at=now)
    reason = (
        f"{release.step}: the process died {interruptions} times in this step, and {policy.interruptions} are allowed "
        "(retry.interruptions). Look for what kills it, such as too little memory"
    )
    return quarantined(replace(release, interruptions=interruptions), reason, now)


def advanced(release: Release, results: Mapping[str, Any], now: float) -> Release:
    """Return a release whose present step is done, with what it found out."""
    step = STEPS[STEPS.index(release.step) + 1]
    merged = {**release.results, **results}
    return replace(release, step=step, failures=0, interruptions=0, results=merged, reason="", changed_at=now)


def failed(release: Release, reason: str, policy: RetryPolicy, now: float, *, may_last: bool = False) -> Release:
    """Return a release whose attempt failed of what may pass: it waits, or is quarantined after too many.

    What `may_last` without being the release's fault is waited for however often it was met.
    """
    failures, reason = release.failures + 1, f"{release.step}: {reason}"
    if failures >= policy.attempts and not may_last:
        return quarantined(replace(release, failures=failures), f"{reason} ({failures} attempts)", now)
    due = now + policy.wait(failures)
    return replace(release, status="waiting", failures=failures, reason=reason, due=due, changed_at=now)


def stopped(release: Release, now: float, wait: float = 0.0) -> Release:
    """Return a release put back because the watcher stops, or because its work is held elsewhere: no failure."""
    return replace(release, status="found", due=now + wait, changed_at=now)


def skipped(release: Release, reason: str, now: float) -> Release:
    """Return a release that turned out not to fit; it is not judged again until revived."""
    results = {**release.results, "planned": True}
    return replace(release, status="skipped", reason=reason, results=results, changed_at=now)


def quarantined(release: Release, reason: str, now: float) -> Release:
    """Return a release that needs a person."""
    return replace(release, status="quarantined", reason=reason, changed_at=now)


def published(release: Release, location: str, now: float) -> Release:
    """Return a release that has come to its good end."""
    return replace(release, status="published", location=location, reason="", changed_at=now)


def revived(release: Release, now: float) -> Release:
    """Return a release that a person gives another chance, from its first step."""
    return begin(release.number, release.found, "", now)
