"""The watcher's memory: one SQLite file, a row for each release and each attempt, changed only in transactions.

Whoever works on a release holds a lock of the kernel on a file of its own. The kernel drops it with the process,
however that dies, and no clock has a say in it; so two watchers never have one release, and a dead one's is free at
once. The file and its locks must be on one machine, or on a file system whose locks hold between machines.

What is to be told to others is written in the same transaction as what happened, and taken out once it is delivered.
"""

import fcntl
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.watch import lifecycle
from cluster.watch.lifecycle import OPEN, Found, Release, RetryPolicy
from cluster.watch.rows import SCHEMA, VERSION, Attempt, Notice, SourceCheck, from_row, to_row
from pipeline.errors import StateError

Clock = Callable[[], float]
Change = Callable[[Release, float], Release]
"""What is to become of a release, at a time."""

BUSY_SECONDS = 60.0
"""How long a transaction waits for another one: they are all short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may be under way at once, over all watchers of one state file."""

    jobs: int
    disk_bytes: int | None


@dataclass(slots=True)
class Claim:
    """A release that this process works on, for as long as it holds the lock."""

    release: Release
    attempt: int
    _lock: int = field(repr=False)

    def let_go(self) -> None:
        """Drop the lock; does nothing the second time."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class State:
    """All releases that were ever seen. Safe to use from several threads and processes."""

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        """Open a state file, or begin one; raises StateError where it is no state file of this version."""
        self.path, self.clock = path, clock
        self._locks = path.with_name(path.name + ".locks")
        with self._transaction() as db:
            self._locks.mkdir(exist_ok=True)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
        if version not in (0, VERSION):
            raise StateError(
                f"{path} is a watcher's state of version {version}, and this program writes version {VERSION}: "
                "use the version that wrote it, or name a new file"
            )

    def note(self, found: Found, refusal: str) -> Release | None:
        """Remember a release seen at a source, and why filters refuse it if they do; return it if it is new."""
        now = self.clock()
        with self._transaction() as db:
            known = _one(db, "name = ? AND revision = ?", (found.name, found.revision))
            if known is not None:
                again = lifecycle.judged_again(known, refusal, now)
                if again != known:
                    _write(db, again)
                return None
            release = lifecycle.begin(0, found, refusal, now)
            number = db.execute(
                "INSERT INTO releases (name, revision, status, body) VALUES (?, ?, ?, '')",
                (found.name, found.revision, release.status),
            ).lastrowid
            assert number is not None
            _write(db, release := lifecycle.begin(number, found, refusal, now))
            return release

    def knows(self, name: str, revision: str) -> Release | None:
        """Return a release that was seen before."""
        with self._transaction() as db:
            return _one(db, "name = ? AND revision = ?", (name, revision))

    def claim(self, limits: Limits, policy: RetryPolicy) -> Claim | None:
        """Take the first release that is due and that the limits leave room for; None where there is none.

        A model's revisions are taken one after the other, in the order in which they were found. A release that was
        interrupted too often is quarantined as it is taken: there is nothing to do for it but to clear away.
        """
        with self._transaction() as db:
            releases = _many(db, f"status IN ({', '.join('?' * len(OPEN))})", OPEN)
            busy = {r.number for r in releases if r.status == "running" and self._is_locked(r.number)}
            held = sum(r.found.disk_bytes for r in releases if _holds_disk(r))
            names: set[str] = set()
            for release in releases:
                first = release.found.name not in names
                names.add(release.found.name)
                if not first or release.number in busy or len(busy) >= limits.jobs:
                    continue
                more = 0 if _holds_disk(release) else release.found.disk_bytes
                fits = limits.disk_bytes is None or more == 0 or held + more <= limits.disk_bytes
                if fits and lifecycle.is_due(release, self.clock(), policy):
                    claim = self._take(db, release, policy)
                    if claim is not None:
                        return claim
        return None

    def change(self, claim: Claim, change: Change) -> Release:
        """Carry out what happened to a release in hand; once it no longer runs, its attempt has ended."""
        now = self.clock()
        with self._transaction() as db:
            release = _one(db, "number = ?", (claim.release.number,))
            assert release is not None
            open_attempt = db.execute("SELECT ended FROM attempts WHERE number = ?", (claim.attempt,)).fetchone()
            if release.status != "running" or open_attempt[0] is not None:
                raise StateError(f"{release.label} is {release.status}, so nothing can be done to it as if it ran")
            claim.release = change(release, now)
            _write(db, claim.release)
            if claim.release.status != "running":
                _end_attempt(db, claim.attempt, claim.release, now)
                _tell(db, claim.release, now)
        return claim.release

    def revive(self, name: str) -> list[Release]:
        """Give every quarantined or skipped revision of a model another chance."""
        now = self.clock()
        with self._transaction() as db:
            releases = _many(db, "name = ? AND status IN ('quarantined', 'skipped')", (name,))
            for release in releases:
                _write(db, lifecycle.revived(release, now))
        return releases

    def releases(self) -> list[Release]:
        """Return all releases, the first found first."""
        with self._transaction() as db:
            return _many(db, "1", ())

    def attempts(self, number: int) -> list[Attempt]:
        """Return all attempts at a release, in order."""
        with self._transaction() as db:
            query = "SELECT release, owner, began, ended, step, outcome, reason FROM attempts WHERE release = ?"
            return [Attempt(*row) for row in db.execute(query + " ORDER BY number", (number,))]

    def is_worked_on(self, release: Release) -> bool:
        """Whether a live process holds a release."""
        return release.status == "running" and self._is_locked(release.number)

    def checked(self, source: str, error: str) -> None:
        """Remember that a source was asked, and what went wrong if something did."""
        with self._transaction() as db:
            db.execute("REPLACE INTO sources (name, checked, error) VALUES (?, ?, ?)", (source, self.clock(), error))

    def sources(self) -> list[SourceCheck]:
        """Return when each source was last asked."""
        with self._transaction() as db:
            return [SourceCheck(*row) for row in db.execute("SELECT name, checked, error FROM sources ORDER BY name")]

    def notices(self) -> list[Notice]:
        """Return what is still to be told, the oldest first."""
        with self._transaction() as db:
            rows = db.execute("SELECT number, body, due, tries FROM notices ORDER BY number").fetchall()
        return [Notice(number, json.loads(body), due, tries) for number, body, due, tries in rows]

    def told(self, notice: Notice) -> None:
        """Forget a notice that was delivered, or given up."""
        with self._transaction() as db:
            db.execute("DELETE FROM notices WHERE number = ?", (notice.number,))

    def tell_later(self, notice: Notice, due: float) -> None:
        """Keep a notice that could not be delivered."""
        with self._transaction() as db:
            db.execute("UPDATE notices SET tries = tries + 1, due = ? WHERE number = ?", (due, notice.number))

    def _take(self, db: sqlite3.Connection, release: Release, policy: RetryPolicy) -> Claim | None:
        lock = self._try_lock(release.number)
        if lock is None:
            return None
        now, taken = self.clock(), lifecycle.taken(release, policy, self.clock())
        if release.status == "running":
            query = (
                "UPDATE attempts SET ended = ?, step = ?, outcome = 'interrupted' WHERE release = ? AND ended IS NULL"
            )
            db.execute(query, (now, release.step, release.number))
        _write(db, taken)
        if taken.status != "running":
            _tell(db, taken, now)
            return Claim(taken, 0, lock)
        owner = f"process {os.getpid()} on host {socket.gethostname()}"
        query = "INSERT INTO attempts (release, owner, began, step) VALUES (?, ?, ?, ?)"
        attempt = db.execute(query, (release.number, owner, now, release.step)).lastrowid
        assert attempt is not None
        return Claim(taken, attempt, lock)

    def _try_lock(self, number: int) -> int | None:
        fd = os.open(self._locks / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _is_locked(self, number: int) -> bool:
        fd = self._try_lock(number)
        if fd is not None:
            os.close(fd)
        return fd is None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection; all that is done with it becomes durable at once, or nothing of it.

        Raises StateError where the file is damaged, or the disk refuses.
        """
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = EXTRA")
                db.execute("BEGIN IMMEDIATE")
                yield db  # what is raised here leaves the transaction open, and closing undoes it
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise StateError(
                f"{self.path} cannot be used as a watcher's state: {error}. If it is damaged, restore it from a copy, "
                "or name a new file: what was published is found at its place, and not published again"
            ) from error


def _holds_disk(release: Release) -> bool:
    """Whether files of a release may be on disk: it has begun, and has not come to an end."""
    return release.status == "running" or release.step != lifecycle.STEPS[0]


def _one(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> Release | None:
    return next(iter(_many(db, where, values)), None)


def _many(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[Release]:
    rows = db.execute(
        f"SELECT number, name, revision, status, body FROM releases WHERE {where} ORDER BY number", values
    )
    return [from_row(row) for row in rows]


def _write(db: sqlite3.Connection, release: Release) -> None:
    db.execute("UPDATE releases SET status = ?, body = ? WHERE number = ?", to_row(release))


def _end_attempt(db: sqlite3.Connection, attempt: int, release: Release, now: float) -> None:
    outcome = {"found": "stopped", "waiting": "failed"}.get(release.status, release.status)
    query = "UPDATE attempts SET ended = ?, step = ?, outcome = ?, reason = ? WHERE number = ?"
    db.execute(query, (now, release.step, outcome, release.reason, attempt))


def _tell(db: sqlite3.Connection, release: Release, now: float) -> None:
    """Write down what others are to be told: what has come to an end, good or bad."""
    if release.status in OPEN:
        return
    body = {
        "event": release.status, "model": release.found.name, "revision": release.found.revision,
        "reason": release.reason, "location": release.location, "time": now,
    }  # fmt: skip
    db.execute("INSERT INTO notices (body, due, tries) VALUES (?, ?, 0)", (json.dumps(body), now))
