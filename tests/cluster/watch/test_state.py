"""The state file: transactions, claims that one process at a time holds, limits, and news that is never lost."""

import multiprocessing
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cluster.watch import lifecycle
from cluster.watch.state import Claim, Limits, State
from pipeline.errors import StateError
from tests.cluster.watch.releases import MANY, ONE_AT_A_TIME, POLICY, Clock, found

PATIENCE = 60.0


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> State:
    return State(tmp_path / "state.db", clock)


def take(state: State, limits: Limits = ONE_AT_A_TIME) -> Claim:
    claim = state.claim(limits, POLICY)
    assert claim is not None
    return claim


def publish(state: State, claim: Claim) -> None:
    state.change(claim, lambda release, now: lifecycle.published(release, "there", now))
    claim.let_go()


def test_a_release_is_new_once(state: State) -> None:
    assert state.note(found(), "") is not None
    assert state.note(found(), "") is None
    assert state.note(found(revision="2" * 40), "") is not None
    assert [release.found.revision[0] for release in state.releases()] == ["1", "2"]


def test_a_release_is_kept_whole_by_another_process_opening_the_file(state: State, clock: Clock) -> None:
    state.note(found(facts={"licence": None, "files": {"a": {"size": 1}}}), "")
    assert State(state.path, clock).releases() == state.releases()
    assert state.releases()[0].found.facts["files"] == {"a": {"size": 1}}


def test_a_claim_is_one_processs_alone_until_it_lets_go(state: State, clock: Clock) -> None:
    state.note(found(), "")
    other = State(state.path, clock)
    claim = take(state, MANY)
    assert other.claim(MANY, POLICY) is None
    assert state.claim(MANY, POLICY) is None  # not even this process
    publish(state, claim)
    assert other.claim(MANY, POLICY) is None
    assert state.releases()[0].status == "published"


def test_many_watchers_at_once_take_each_release_once(state: State, clock: Clock) -> None:
    for index in range(12):
        state.note(found(name=f"acme/m{index}"), "")
    taken: list[int] = []

    def watch() -> None:
        own = State(state.path, clock)
        while (claim := own.claim(MANY, POLICY)) is not None:
            taken.append(claim.release.number)
            publish(own, claim)

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(taken) == [release.number for release in state.releases()]


def test_jobs_are_limited_over_all_watchers(state: State, clock: Clock) -> None:
    for index in range(4):
        state.note(found(name=f"acme/m{index}"), "")
    other, two = State(state.path, clock), Limits(jobs=2, disk_bytes=None)
    first, second = take(state, two), take(other, two)
    assert state.claim(two, POLICY) is None
    publish(other, second)
    take(state, two).let_go()
    first.let_go()


def test_disk_is_limited_over_all_that_has_begun(state: State) -> None:
    for index in range(3):
        state.note(found(name=f"acme/m{index}", disk_bytes=40), "")
    limits = Limits(jobs=9, disk_bytes=100)
    first, second = take(state, limits), take(state, limits)
    assert state.claim(limits, POLICY) is None
    state.change(first, lambda release, now: lifecycle.advanced(release, {}, now))
    state.change(first, lambda release, now: lifecycle.failed(release, "no network", POLICY, now))
    first.let_go()
    assert state.claim(limits, POLICY) is None  # it waits, and its files are still there
    publish(state, second)
    take(state, limits).let_go()


def test_a_release_that_has_begun_needs_no_more_room_to_go_on(state: State, clock: Clock) -> None:
    state.note(found(disk_bytes=80), "")
    claim = take(state)
    state.change(claim, lambda release, now: lifecycle.advanced(release, {}, now))
    state.change(claim, lambda release, now: lifecycle.failed(release, "no network", POLICY, now))
    claim.let_go()
    clock.now += POLICY.first_wait
    take(state, Limits(jobs=1, disk_bytes=50)).let_go()  # the limit was lowered meanwhile


def test_revisions_of_one_model_are_taken_in_the_order_they_were_found(state: State, clock: Clock) -> None:
    for revision in ("1" * 40, "2" * 40):
        state.note(found(revision=revision), "")
    first = take(state, MANY)
    assert first.release.found.revision == "1" * 40
    assert state.claim(MANY, POLICY) is None
    state.change(first, lambda release, now: lifecycle.failed(release, "no network", POLICY, now))
    first.let_go()
    assert state.claim(MANY, POLICY) is None  # the first one waits, so the second does
    clock.now += POLICY.first_wait
    publish(state, take(state, MANY))
    assert take(state, MANY).release.found.revision == "2" * 40


def test_a_clock_that_is_set_back_a_year_holds_nothing(state: State, clock: Clock) -> None:
    state.note(found(), "")
    claim = take(state)
    state.change(claim, lambda release, now: lifecycle.failed(release, "no network", POLICY, now))
    claim.let_go()
    clock.now -= 365 * 86_400
    assert take(state).release.failures == 1


def test_a_clock_that_leaps_on_does_not_take_work_from_the_living(state: State, clock: Clock) -> None:
    state.note(found(), "")
    claim = take(state)
    clock.now += 365 * 86_400
    assert State(state.path, clock).claim(MANY, POLICY) is None
    publish(state, claim)


def test_attempts_tell_the_story(state: State, clock: Clock) -> None:
    state.note(found(), "")
    claim = take(state)
    clock.now += 5
    state.change(claim, lambda release, now: lifecycle.failed(release, "no network", POLICY, now))
    claim.let_go()
    clock.now += 60
    publish(state, take(state))
    story = state.attempts(1)
    assert [(one.outcome, one.reason) for one in story] == [("failed", "plan: no network"), ("published", "")]
    assert story[0].ended is not None
    assert story[0].ended - story[0].began == 5
    assert f"process {os.getpid()} on host " in story[0].owner


def test_nothing_can_be_done_to_a_release_that_has_come_to_its_end(state: State) -> None:
    state.note(found(), "")
    claim = take(state)
    publish(state, claim)
    with pytest.raises(StateError, match="acme/tiny@111111111111 is published, so nothing can be done"):
        state.change(claim, lifecycle.stopped)


def test_a_change_that_fails_changes_nothing(state: State) -> None:
    state.note(found(), "")
    claim = take(state)

    def broken(release: lifecycle.Release, now: float) -> lifecycle.Release:
        raise KeyError("oh")

    before = state.releases()
    with pytest.raises(KeyError):
        state.change(claim, broken)
    assert state.releases() == before
    publish(state, claim)


def test_what_has_come_to_an_end_is_news_until_it_is_told(state: State, clock: Clock) -> None:
    state.note(found(), "")
    publish(state, take(state))
    (notice,) = state.notices()
    assert notice.body == {
        "event": "published", "model": "acme/tiny", "revision": "1" * 40, "reason": "", "location": "there",
        "time": clock.now,
    }  # fmt: skip
    state.tell_later(notice, clock.now + 10)
    (notice,) = state.notices()
    assert (notice.tries, notice.is_due(clock.now, 60), notice.is_due(clock.now + 10, 60)) == (1, False, True)
    assert notice.is_due(clock.now - 100_000, 60)  # the clock was set back
    state.told(notice)
    assert state.notices() == []


def test_a_person_revives_what_was_given_up(state: State) -> None:
    state.note(found(), "")
    claim = take(state)
    state.change(claim, lambda release, now: lifecycle.quarantined(release, "bad", now))
    claim.let_go()
    assert state.claim(MANY, POLICY) is None
    assert [release.reason for release in state.revive("acme/tiny")] == ["bad"]
    assert state.revive("acme/other") == []
    publish(state, take(state))


def test_sources_are_remembered_with_what_went_wrong(state: State, clock: Clock) -> None:
    state.checked("acme", "")
    clock.now += 1
    state.checked("acme", "no network")
    (check,) = state.sources()
    assert (check.name, check.checked, check.error) == ("acme", clock.now, "no network")


@pytest.mark.parametrize("content", [b"this is no database" * 100, b""], ids=["garbage", "an empty file"])
def test_a_file_is_a_state_or_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(content)
    if not content:
        assert State(path).releases() == []
        return
    with pytest.raises(StateError, match=r"cannot be used as a watcher's state: file is not a database"):
        State(path)
    assert path.read_bytes() == content


def test_a_state_of_a_later_version_is_refused(state: State) -> None:
    with sqlite3.connect(state.path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(StateError, match="is a watcher's state of version 2, and this program writes version 1"):
        State(state.path)


def _hold(reports: Connection, path: Path) -> None:
    claim = State(path, Clock()).claim(MANY, POLICY)
    reports.send(claim is not None)
    signal.pause()


@pytest.fixture
def holder(state: State) -> Iterator[multiprocessing.process.BaseProcess]:
    """A process that has taken the only release."""
    state.note(found(), "")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(theirs, state.path))
    process.start()
    assert ours.poll(PATIENCE)
    assert ours.recv() is True
    yield process
    process.kill()
    process.join()
    ours.close()
    theirs.close()


def test_a_killed_process_leaves_its_release_to_the_next_at_once(
    state: State, holder: multiprocessing.process.BaseProcess
) -> None:
    (release,) = state.releases()
    assert state.is_worked_on(release)
    assert state.claim(MANY, POLICY) is None
    holder.kill()
    holder.join()
    assert not state.is_worked_on(release)
    claim = take(state)
    assert claim.release.interruptions == 1
    assert [one.outcome for one in state.attempts(1)] == ["interrupted", ""]
    publish(state, claim)


def test_a_release_that_kills_every_process_is_quarantined(state: State) -> None:
    state.note(found(), "")
    for _ in range(POLICY.interruptions + 1):
        take(state).let_go()  # as the kernel does for a process that dies
    take(state).let_go()  # to be cleared away
    assert state.claim(MANY, POLICY) is None
    (release,) = state.releases()
    assert release.status == "quarantined"
    assert [notice.body["event"] for notice in state.notices()] == ["quarantined"]
    assert partial(state.is_worked_on, release)() is False


def test_what_is_committed_survives_a_power_cut_at_once(state: State) -> None:
    with state._transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA: the journal's end is on disk too
