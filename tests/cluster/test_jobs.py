"""Jobs as values: names, what they are found by, and Ray's words for them in ours."""

import json
import re
from pathlib import Path

import pytest

from cluster.jobs import find, moment, new_name, status_of
from pipeline.errors import SubmissionError
from tests.cluster.fake_jobs import some_facts


def test_a_name_tells_the_run_directory_and_is_new_each_time() -> None:
    names = {new_name(Path("/runs/llama 2 (besa) 50%")) for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch(r"secateur-llama-2-besa-50-[0-9a-f]{8}", name) for name in names)
    assert re.fullmatch(r"secateur-[0-9a-f]{8}", new_name(Path("/…")))


def test_a_job_is_found_by_its_name_or_enough_of_either_end() -> None:
    jobs = [some_facts("secateur-a-11"), some_facts("secateur-a-1"), some_facts("secateur-b-2")]
    assert find(jobs, "secateur-a-1") is jobs[1]  # exactly, though another begins so too
    assert find(jobs, "secateur-b") is jobs[2]
    assert find(jobs, "-11") is jobs[0]
    with pytest.raises(SubmissionError, match=r"2 jobs go by 'secateur-a' \(secateur-a-11, secateur-a-1\): give more"):
        find(jobs, "secateur-a")


@pytest.mark.parametrize("name", ["other", ""])
def test_a_name_nothing_goes_by_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(SubmissionError, match=rf"no job '{name}' of secateur; it has secateur-a-1"):
        find([some_facts()], name)
    with pytest.raises(SubmissionError, match=r"it has none at all, and forgets all when its head is started anew"):
        find([], name)


@pytest.mark.parametrize(
    ("status", "exit_status", "ours"),
    [
        ("PENDING", None, "pending"),
        ("RUNNING", None, "running"),
        ("SUCCEEDED", 0, "succeeded"),
        ("STOPPED", None, "stopped"),
        ("FAILED", 1, "failed"),
        ("FAILED", 75, "stopped"),  # signalled otherwise than through Ray
    ],
)
def test_a_status_is_said_in_our_words(status: str, exit_status: int | None, ours: str) -> None:
    assert status_of(status, exit_status) == ours
    assert some_facts(status=status_of(status, exit_status)).is_over == (ours not in ("pending", "running"))


def test_a_status_that_ray_may_invent_is_refused() -> None:
    with pytest.raises(SubmissionError, match=r"calls a job 'RETRYING', which this version does not know"):
        status_of("RETRYING", None)


def test_facts_are_plain_data_with_times_that_any_program_reads() -> None:
    plain = json.loads(json.dumps(some_facts().as_json()))
    assert (plain["began"], plain["ended"]) == ("2026-11-22T00:00:00+00:00", None)
    assert moment(None) is None
    assert str(moment(1_763_800_000_500)) == "2025-11-22 08:26:40.500000+00:00"
