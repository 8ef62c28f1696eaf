"""One release on its way, step by step: each may be cut off anywhere and done again to the same end.

plan     what it takes, from its headers alone; a release that does not fit is skipped
fetch    its files, each held against its hash
prune    a run of its own, which goes on from its last commit
gate     checks, before anybody sees it
publish  whole or not at all, once
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi

from cluster.watch import hub, lifecycle
from cluster.watch.card import write_card
from cluster.watch.config import WatchConfig
from cluster.watch.discovery import look_at
from cluster.watch.gate import pass_gate
from cluster.watch.lifecycle import Found, Release
from cluster.watch.pruning import Pruner
from cluster.watch.publish import Publisher
from cluster.watch.state import Claim, State
from pipeline.config import RunConfig
from pipeline.errors import (
    BudgetExceeded,
    CalibrationError,
    CheckpointError,
    ClusterUnreachable,
    ConfigChanged,
    ConfigError,
    GateFailed,
    NoRoom,
    NumericsError,
    ReleaseChanged,
    RunLocked,
    RunStopped,
    SecateurError,
    UnsupportedCheckpoint,
    VerificationError,
)
from pipeline.human import human_bytes
from pipeline.planning.plan import make_plan
from pipeline.progress import Say, StopAsked
from pipeline.run import counted

WOULD_COME_AGAIN = (
    BudgetExceeded, CalibrationError, CheckpointError, ConfigError, GateFailed, NumericsError, VerificationError,
)  # fmt: skip
"""Errors that another try would meet again: the release is quarantined at once."""

MAY_LAST = (NoRoom, ClusterUnreachable)
"""Errors that are waited out for as long as they last: a release is never quarantined for them. A job may be going on
in a cluster out of reach, and quarantine would take its files away."""

HELD_SECONDS = 30.0
"""Before a release whose run directory another process still holds is looked at again."""

LOG = "log.txt"
"""What the pruning of a release said, in its directory."""


class Worker:
    """Takes claimed releases through their steps."""

    def __init__(
        self, config: WatchConfig, state: State, api: HfApi, pruner: Pruner, publisher: Publisher,
        say: Say, stop_asked: StopAsked,
    ) -> None:  # fmt: skip
        self._config, self._state, self._api, self._pruner = config, state, api, pruner
        self._publisher, self._say, self._stop_asked = publisher, say, stop_asked

    def work(self, claim: Claim) -> None:
        """Go through the steps that are left, to an end or a failure, and write down how it went."""
        label = claim.release.label
        try:
            while claim.release.status == "running":
                if self._stop_asked():
                    raise RunStopped(f"{label} is put back")
                self._say(f"{label}: {claim.release.step}")
                _STEPS[claim.release.step](self, claim)
        except Exception as error:  # whatever it is, other releases go on, and a person is told
            self._write_down(claim, error)
        finally:
            release = claim.release
            self._clear_away(release)
            claim.let_go()
        outcome = release.location or release.reason
        self._say(f"{label}: {release.status}{': ' + outcome if outcome else ''}")

    def sweep(self) -> None:
        """Remove the files of releases that have come to an end, left by a process killed before it did."""
        for release in self._state.releases():
            self._clear_away(release)

    def directory_of(self, found: Found) -> Path:
        """Return where a release is worked on: a name of its own, whatever state file knows it."""
        digest = hashlib.sha256(f"{found.name}@{found.revision}".encode()).hexdigest()[:12]
        return self._config.work / f"{re.sub(r'[^A-Za-z0-9._-]', '-', found.name)}-{digest}"

    def _clear_away(self, release: Release) -> None:
        """Remove the files of a release that has come to an end, but for the log of one that needs a person."""
        if release.status in lifecycle.OPEN:
            return
        own = self.directory_of(release.found)
        if release.status == "quarantined" and (own / LOG).exists():
            for path in own.iterdir():
                if path.name != LOG:
                    shutil.rmtree(path, ignore_errors=True)
        else:
            shutil.rmtree(own, ignore_errors=True)

    def _write_down(self, claim: Claim, error: Exception) -> None:
        message = error.message if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
        reason = hub.redacted(message)
        if isinstance(error, RunStopped):
            self._state.change(claim, lifecycle.stopped)
        elif isinstance(error, RunLocked):  # by a run that outlived its watcher, and is about to stop
            self._state.change(claim, partial(lifecycle.stopped, wait=HELD_SECONDS))
        elif isinstance(error, ReleaseChanged):
            self._state.change(claim, lambda release, now: lifecycle.skipped(release, reason, now))
        elif isinstance(error, WOULD_COME_AGAIN):
            step = claim.release.step
            self._state.change(claim, lambda release, now: lifecycle.quarantined(release, f"{step}: {reason}", now))
        else:
            failed = partial(lifecycle.failed, may_last=isinstance(error, MAY_LAST))
            policy = self._config.retry_policy
            self._state.change(claim, lambda release, now: failed(release, reason, policy, now))

    def _plan(self, claim: Claim) -> None:
        found = claim.release.found
        there = self._publisher.find(found)
        if there:  # the state was lost, or never knew
            self._state.change(claim, lambda release, now: lifecycle.published(release, there, now))
            return
        try:
            refused = self._refused_by_plan(found)
        except UnsupportedCheckpoint as error:
            refused = error.message
        if refused:
            self._state.change(claim, lambda release, now: lifecycle.skipped(release, f"plan: {refused}", now))
        else:
            self._advance(claim, {})

    def _refused_by_plan(self, found: Found) -> str:
        """Say why a release does not fit here; empty where it does. Raises NoRoom where it does not just now."""
        self._require_room(found)
        directory = self._planned_directory(found)
        run = self._config.run_config(directory, self.directory_of(found) / "run")
        if run.cluster is not None or self._config.submit is not None:
            return ""  # whoever prunes it plans for themselves
        plan = make_plan(counted(run, directory), directory, None)
        shutil.rmtree(self.directory_of(found) / "shell", ignore_errors=True)
        if plan.refused and not run.memory.is_managed:
            raise NoRoom(f"it does not fit into the memory that is free now: {'; '.join(plan.refused)}")
        return "; ".join(plan.refused)

    def _planned_directory(self, found: Found) -> Path:
        """Return a model directory whose headers are the release's."""
        if found.origin != "hub":
            return self._source(found)
        own = self.directory_of(found)
        (own / "source").mkdir(parents=True, exist_ok=True)
        hub.fetch_described(found, own / "source")
        hub.write_shell(self._api, found, own / "source", own / "shell")
        return own / "shell"

    def _require_room(self, found: Found) -> None:
        self._config.work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._config.work).free
        if found.disk_bytes > free:
            raise NoRoom(
                f"it takes {human_bytes(found.disk_bytes)} of disk, and {human_bytes(free)} are free in "
                f"{self._config.work}; it is tried again when there is more"
            )

    def _fetch(self, claim: Claim) -> None:
        found = claim.release.found
        if found.origin == "hub":
            hub.fetch_weights(found, self._source(found))
        self._advance(claim, {})

    def _prune(self, claim: Claim) -> None:
        found = claim.release.found
        own, run = self.directory_of(found), self._run(found)
        own.mkdir(parents=True, exist_ok=True)
        try:
            self._pruner(run, own / LOG, self._stop_asked)
        except ConfigChanged as error:
            self._say(f"{claim.release.label}: begun anew, for it was begun with other settings: {error.message}")
            shutil.rmtree(run.output)
            self._pruner(run, own / LOG, self._stop_asked)
        self._source(found)
        self._advance(claim, {})

    def _gate(self, claim: Claim) -> None:
        results = pass_gate(self._config.gate, self._run(claim.release.found))
        self._advance(claim, results)

    def _publish(self, claim: Claim) -> None:
        found = claim.release.found
        run = self._run(found)
        card = write_card(found, self._config.recipe(), claim.release.results)
        location = self._publisher.publish(found, run.output / "model", card)
        self._state.change(claim, lambda release, now: lifecycle.published(release, location, now))

    def _advance(self, claim: Claim, results: dict[str, object]) -> None:
        def change(release: Release, now: float) -> Release:
            return lifecycle.advanced(release, results, now)

        self._state.change(claim, change)

    def _run(self, found: Found) -> RunConfig:
        return self._config.run_config(self._source(found), self.directory_of(found) / "run")

    def _source(self, found: Found) -> Path:
        """Return where a release's files are; raises ReleaseChanged where a watched directory holds others by now."""
        if found.origin == "hub":
            return self.directory_of(found) / "source"
        path = Path(found.origin)
        try:
            revision = look_at(path)[0].revision
        except (OSError, ValueError):
            revision = ""
        if revision != found.revision:
            raise ReleaseChanged(
                f"{path} is no longer what it was when it was found; what it holds now is a release of its own"
            )
        return path


_STEPS: dict[lifecycle.Step, Callable[[Worker, Claim], None]] = {
    "plan": Worker._plan,
    "fetch": Worker._fetch,
    "prune": Worker._prune,
    "gate": Worker._gate,
    "publish": Worker._publish,
}
