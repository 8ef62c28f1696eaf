"""A followed log is shown once and whole, whatever happens to the connection."""

import pytest

from cluster import follow as following
from cluster.follow import follow
from cluster.jobs import JobFacts
from pipeline.errors import ClusterUnreachable
from tests.cluster.fake_jobs import LOST, FakeJobs, some_facts

JOB = "secateur-a-1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.02)
    monkeypatch.setattr(following, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(following, "FIRST_PAUSE", 0.01)


def followed(server: FakeJobs) -> tuple[str, list[str], JobFacts]:
    shown: list[str] = []
    said: list[str] = []
    facts = follow(server, JOB, shown.append, said.append)
    return "".join(shown), said, facts


def test_a_log_is_shown_to_its_end() -> None:
    server = FakeJobs(some_facts(status="succeeded"))
    server.pieces = ["one\n", "two\n", "end of the log"]
    assert followed(server) == ("one\ntwo\n", [], server.known[JOB])


def test_a_log_goes_on_where_it_was_when_the_connection_was_lost() -> None:
    server = FakeJobs(some_facts(status="succeeded"))
    # Each new connection begins at the beginning, and may cut the log elsewhere.
    server.pieces = ["one\ntw", LOST, "one\n", LOST, "one\n", "two\nthree\n", "end of the log"]
    shown, said, _ = followed(server)
    assert shown == "one\ntwo\nthree\n"
    assert said == [f"{LOST.message}; trying again, the job does not need this"]


def test_following_ends_where_a_dead_connection_hides_that_the_job_is_over() -> None:
    server = FakeJobs(some_facts(), on_poll=lambda server: server.finish(JOB, "failed", 1))
    server.pieces = ["one\n"]
    shown, _, facts = followed(server)
    assert (shown, facts.status, facts.exit_status) == ("one\n", "failed", 1)


def test_a_log_that_ends_before_its_job_is_asked_for_again() -> None:
    polls: list[None] = []

    def later(server: FakeJobs) -> None:
        polls.append(None)
        if len(polls) == 3:
            server.finish(JOB, "succeeded")
        server.pieces = ["one\n", "end of the log"]

    server = FakeJobs(some_facts(), on_poll=later)
    server.pieces = ["end of the log"]
    shown, said, facts = followed(server)
    assert (shown, said, facts.status, len(polls)) == ("one\n", [], "succeeded", 3)


def test_a_cluster_that_stays_out_of_reach_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOST_SECONDS", 0.05)

    def unreachable(server: FakeJobs) -> None:
        raise LOST

    server = FakeJobs(some_facts(), on_poll=unreachable)
    server.pieces = ["one\n"]  # silence after it: the question that follows is not answered
    with pytest.raises(ClusterUnreachable, match=r"connection to http://head:8265 was lost"):
        followed(server)
