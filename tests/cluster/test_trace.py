"""Spans come of entered phases, overlaps of spans, and the file is one that trace viewers read."""

import json

import pytest

from cluster.messages import Entered
from cluster.trace import Span, Trace, chrome_trace, overlaps


def span(stage: int, phase: str, start: float, end: float, replica: int = 0) -> Span:
    return Span(stage=stage, replica=replica, block=0, phase=phase, start=start, end=end)


def entered(stage: int, replica: int, block: int, phase: str, at: float) -> Entered:
    return Entered(stage=stage, attempt=1, replica=replica, block=block, phase=phase, at=at)


def test_a_phase_lasts_until_the_same_replica_enters_the_next() -> None:
    trace = Trace()
    for event in (
        entered(0, 0, 3, "read", 10.0),
        entered(0, 1, 3, "read", 11.0),
        entered(0, 0, 3, "collect", 12.0),
        entered(1, 0, 9, "read", 12.5),
    ):
        trace.enter(event)
    assert trace.spans == [Span(stage=0, replica=0, block=3, phase="read", start=10.0, end=12.0)]
    trace.close(0, 11.5)  # by a clock that is behind
    assert trace.spans[1:] == [
        Span(stage=0, replica=1, block=3, phase="read", start=11.0, end=11.5),
        Span(stage=0, replica=0, block=3, phase="collect", start=12.0, end=12.0),
    ]
    trace.close(0, 20.0)
    assert len(trace.spans) == 3


def test_a_stage_hands_on_while_it_propagates_and_the_next_collects() -> None:
    spans = [
        span(0, "propagate", 0, 4), span(0, "propagate", 1, 6, replica=1), span(0, "prune", 6, 9),
        span(1, "collect", 2, 3), span(1, "collect", 5, 8), span(2, "collect", 0, 9),
    ]  # fmt: skip
    assert overlaps(spans).handing_on == pytest.approx({0: 2.0, 1: 0.0})


def test_stages_that_prune_at_once_are_counted() -> None:
    spans = [
        span(0, "read", 0, 2), span(0, "prune", 2, 10), span(0, "prune", 3, 9, replica=1),
        span(1, "collect", 1, 4), span(2, "commit", 3, 4), span(2, "propagate", 4, 9),
    ]  # fmt: skip
    assert overlaps(spans).at_once == pytest.approx({1: 7.0, 2: 2.0, 3: 1.0})
    assert overlaps(spans, ["prune"]).at_once == pytest.approx({1: 8.0})
    assert overlaps([]).at_once == {}


def test_the_file_has_a_row_for_each_replica_and_microseconds() -> None:
    spans = [span(1, "prune", 1e9 + 0.5, 1e9 + 0.75), span(0, "read", 1e9, 1e9 + 0.5, replica=2)]
    events = json.loads(chrome_trace(spans))["traceEvents"]
    names = [(e["name"], e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 0, "stage 0"), ("process_name", 1, "stage 1"),
        ("thread_name", 0, "replica 2"), ("thread_name", 1, "replica 0"),
    ]  # fmt: skip
    drawn = [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert drawn == [("read 0", 0, 2, 0, 500_000), ("prune 0", 1, 0, 500_000, 250_000)]
    assert json.loads(chrome_trace([]))["traceEvents"] == []
