"""What may happen to a release, held against its drawing."""

from collections.abc import Callable

import pytest

from cluster.watch import lifecycle
from cluster.watch.lifecycle import OPEN, STEPS, RetryPolicy
from tests.cluster.watch.releases import POLICY, found, release


def test_a_release_that_nothing_refuses_is_to_be_done_from_its_first_step() -> None:
    new = lifecycle.begin(7, found(), "", 5.0)
    assert (new.status, new.step, new.due, new.found_at) == ("found", "plan", 5.0, 5.0)
    assert new.label == "acme/tiny@111111111111"


def test_a_refused_release_is_skipped_with_the_reason() -> None:
    new = lifecycle.begin(7, found(), "too large", 5.0)
    assert (new.status, new.reason) == ("skipped", "too large")


def test_filters_that_change_their_mind_let_a_release_in_and_out() -> None:
    refused = lifecycle.begin(7, found(), "too old", 5.0)
    wanted = lifecycle.judged_again(refused, "", 9.0)
    assert (wanted.status, wanted.reason, wanted.due) == ("found", "", 9.0)
    assert lifecycle.judged_again(refused, "too large", 9.0).reason == "too large"


@pytest.mark.parametrize("status", ["found", "running", "waiting", "published", "quarantined"])
def test_filters_do_not_touch_what_is_on_its_way_or_at_its_end(status: str) -> None:
    known = release(status=status)
    assert lifecycle.judged_again(known, "too old", 9.0) is known


def test_what_a_plan_has_refused_is_not_judged_by_filters_again() -> None:
    skipped = lifecycle.skipped(release(), "plan: needs 80 GB", 3.0)
    assert lifecycle.judged_again(skipped, "", 9.0) is skipped


def test_steps_follow_each_other_and_keep_what_they_found_out() -> None:
    at = lifecycle.taken(release(), POLICY, 1.0)
    for step in STEPS[1:]:
        at = lifecycle.advanced(at, {step: "done"}, 2.0)
        assert at.step == step
    assert at.results == {step: "done" for step in STEPS[1:]}
    assert lifecycle.published(at, "there", 3.0).location == "there"


def test_waits_double_up_to_the_longest() -> None:
    assert [POLICY.wait(failures) for failures in (1, 2, 3, 7, 10_000)] == [60, 120, 240, 3600, 3600]


def test_a_failure_waits_and_one_too_many_quarantines_with_its_reason() -> None:
    at = lifecycle.taken(release(), POLICY, 1.0)
    for failures in (1, 2):
        at = lifecycle.failed(at, "no network", POLICY, 10.0)
        assert (at.status, at.failures, at.due) == ("waiting", failures, 10.0 + POLICY.wait(failures))
        assert at.reason == "plan: no network"
        at = lifecycle.taken(at, POLICY, at.due)
    at = lifecycle.failed(at, "no network", POLICY, 10.0)
    assert (at.status, at.reason) == ("quarantined", "plan: no network (3 attempts)")


def test_what_is_nobodys_fault_is_waited_for_however_often_it_is_met() -> None:
    at = lifecycle.taken(release(), POLICY, 1.0)
    for _ in range(5 * POLICY.attempts):
        at = lifecycle.failed(at, "no room", POLICY, 10.0, may_last=True)
        assert (at.status, at.reason, at.due) == ("waiting", "plan: no room", 10.0 + POLICY.wait(at.failures))


def test_a_completed_step_forgives_earlier_failures() -> None:
    at = release(status="running", failures=2, interruptions=2)
    done = lifecycle.advanced(at, {}, 2.0)
    assert (done.failures, done.interruptions) == (0, 0)


def test_a_process_that_dies_is_forgiven_some_times_within_a_step() -> None:
    at = lifecycle.taken(release(), POLICY, 1.0)
    for deaths in range(1, POLICY.interruptions + 1):
        at = lifecycle.taken(at, POLICY, 2.0)
        assert (at.status, at.interruptions) == ("running", deaths)
    at = lifecycle.taken(at, POLICY, 3.0)
    assert at.status == "quarantined"
    assert "died 3 times in this step, and 2 are allowed" in at.reason


def test_a_stop_is_no_failure() -> None:
    back = lifecycle.stopped(release(status="running", step="prune"), 8.0, wait=30.0)
    assert (back.status, back.step, back.failures, back.due) == ("found", "prune", 0, 38.0)


@pytest.mark.parametrize(
    ("now", "due"),
    [(100.0, True), (99.0, False), (100.0 - 3600, False), (100.0 - 3601, True)],
    ids=["at its time", "just before", "as long before as waits go", "before any wait could have begun"],
)
def test_a_wait_ends_at_its_time_and_no_clock_that_is_set_back_makes_it_last_for_ever(now: float, due: bool) -> None:
    assert lifecycle.is_due(release(status="waiting", due=100.0), now, POLICY) is due


@pytest.mark.parametrize("status", ["published", "skipped", "quarantined"])
def test_what_has_come_to_an_end_is_never_due(status: str) -> None:
    assert status not in OPEN
    assert not lifecycle.is_due(release(status=status, due=0.0), 1e12, POLICY)


@pytest.mark.parametrize(
    "end",
    [
        lambda r: lifecycle.quarantined(r, "bad", 1.0),
        lambda r: lifecycle.skipped(r, "plan: too large", 1.0),
    ],
)
def test_a_person_gives_another_chance_from_the_first_step(
    end: Callable[[lifecycle.Release], lifecycle.Release],
) -> None:
    again = lifecycle.revived(end(release(status="running", step="gate", failures=2)), 9.0)
    assert again == lifecycle.begin(1, found(), "", 9.0)


def test_a_very_long_wait_stays_a_number() -> None:
    policy = RetryPolicy(attempts=10**9, first_wait=1e300, longest_wait=1e301, interruptions=0)
    assert policy.wait(10**6) == 1e301
