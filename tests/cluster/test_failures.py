"""What died is told in few words, once, and kept in the ledger with what is done again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.failures import Recoveries, describe, describe_start, listed
from cluster.messages import Assignment, Failure, Input
from pipeline.ledger import Ledger
from tests.cluster.fake_ledger import MemoryLedger, Told, make_commit
from tests.pipeline.test_ledger import HEADER


def failures(message: str, *replicas: int) -> list[Failure]:
    return [Failure(replica=replica, message=message, fatal=False) for replica in replicas]


def assignment(
    own: range, *, committed: range, source: Input = "rebuild", attempt: int = 1, stage: int = 1
) -> Assignment:
    return Assignment(
        stage=stage, attempt=attempt, start=own.start, stop=own.stop, input=source, forward=False,
        committed={block: make_commit(block) for block in committed},
    )  # fmt: skip


def test_equal_messages_are_one_line_with_everybody_who_died_of_it() -> None:
    many = {2: failures("lost", 0), 1: [*failures("lost", 7, 0, 2, 1, 3), *failures("out of memory", 5)]}
    assert describe(many).splitlines() == [
        "stage 1 replicas 0-3, 7; stage 2 replica 0: lost",
        "stage 1 replica 5: out of memory",
    ]
    assert describe({0: failures("lost", 0, 0)}) == "stage 0 replica 0: lost"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "block 3"), ([3, 4], "blocks 3-4"), ([9, 3, 4, 7], "blocks 3-4, 7, 9"), (range(12), "blocks 0-11")],
)
def test_consecutive_numbers_are_drawn_together(numbers: list[int], text: str) -> None:
    assert listed("block", numbers) == text


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_list_of_numbers_names_each_of_them_and_no_other(numbers: set[int]) -> None:
    noun, _, spelt = listed("rank", numbers).partition(" ")
    ends = [[int(end) for end in part.split("-")] for part in spelt.split(", ")]
    assert sorted(numbers) == [number for end in ends for number in range(end[0], end[-1] + 1)]
    assert noun == ("ranks" if len(numbers) > 1 else "rank")


def test_a_start_tells_what_is_done_again() -> None:
    again = assignment(range(10, 16), committed=range(14), attempt=2)
    assert describe_start(again) == (
        "stage 1 starts again (attempt 2): input rebuilt by running blocks 0-9, replays blocks 10-13, prunes on from 14"
    )
    first = assignment(range(0, 4), committed=range(1), stage=0)
    assert describe_start(first) == "stage 0 starts: input embedded, replays block 0, prunes on from 1"
    sent = assignment(range(4, 6), committed=range(0), source="stream", attempt=3)
    assert describe_start(sent) == "stage 1 starts again (attempt 3): input sent by stage 0, prunes on from 4"
    sender = assignment(range(1, 3), committed=range(3), attempt=2)
    assert describe_start(sender) == (
        "stage 1 starts again (attempt 2): input rebuilt by running block 0, replays blocks 1-2, sends its output again"
    )


def test_a_recovery_is_kept_with_its_cause_and_what_each_stage_does_again(tmp_path: Path) -> None:
    ledger, told = Ledger.open(tmp_path, HEADER), Told()
    recoveries = Recoveries(ledger, told)
    recoveries.open([1, 2], "stages 1 and 2 died")
    recoveries.redone(2, "stage 2 starts again")
    recoveries.open([0], "stage 0 died")
    recoveries.redone(1, "stage 1 starts again")
    recoveries.redone(1, "stage 1 starts for another reason")
    first = {"cause": "stages 1 and 2 died", "redone": ["stage 2 starts again", "stage 1 starts again"]}
    assert Ledger.read(tmp_path).notes == {
        "recovery.1": first,
        "recovery.2": {"cause": "stage 0 died", "redone": []},
    }
    assert told.said == ["stages 1 and 2 died", "stage 2 starts again", "stage 0 died", "stage 1 starts again"]


def test_recoveries_are_counted_on_from_an_earlier_coordinator() -> None:
    ledger = MemoryLedger()
    for number in (1, 2, 10):
        ledger.record(f"recovery.{number}", {"cause": "", "redone": []})
    Recoveries(ledger, Told()).open([0], "stage 0 died")
    assert set(ledger.notes) == {"recovery.1", "recovery.2", "recovery.10", "recovery.11"}
