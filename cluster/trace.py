"""When each replica was in which phase of which block: spans, how much of them overlaps, and a file to look at."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.messages import Entered
from cluster.state import PRUNING

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One phase of one block on one replica, in seconds since the epoch by the clock of the replica's node."""

    stage: int
    replica: int
    block: int
    phase: str
    start: float
    end: float


class Trace:
    """Makes spans of Entered events: a phase lasts until the same replica enters the next."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._open: dict[tuple[int, int], Entered] = {}

    def enter(self, event: Entered) -> None:
        """End the replica's last phase and begin another."""
        self._end(event.stage, event.replica, event.at)
        self._open[event.stage, event.replica] = event

    def close(self, stage: int, at: float) -> None:
        """End what the replicas of a stage are in: the stage has ended."""
        for _, replica in [key for key in self._open if key[0] == stage]:
            self._end(stage, replica, at)

    def _end(self, stage: int, replica: int, at: float) -> None:
        entered = self._open.pop((stage, replica), None)
        if entered is not None:
            end = max(entered.at, at)  # clocks of nodes differ a little
            self.spans.append(
                Span(stage=stage, replica=replica, block=entered.block, phase=entered.phase, start=entered.at, end=end)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaps:
    """Seconds during which stages of a job worked at the same time."""

    handing_on: dict[int, float]
    """By stage s: it propagated while stage s + 1 collected."""

    at_once: dict[int, float]
    """By number of stages: exactly so many were in one of the phases asked for."""


def overlaps(spans: Sequence[Span], phases: Collection[str] = PRUNING) -> Overlaps:
    """Return how long neighbours worked hand in hand, and how long how many stages were in some phases at once.

    A stage is in a phase while any of its replicas is.
    """
    num_stages = max((span.stage for span in spans), default=-1) + 1
    propagating = [_busy(spans, stage, ["propagate"]) for stage in range(num_stages)]
    collecting = [_busy(spans, stage, ["collect"]) for stage in range(num_stages)]
    handing_on = {
        stage: _depths([*propagating[stage], *collecting[stage + 1]]).get(2, 0.0) for stage in range(num_stages - 1)
    }
    busy = [interval for stage in range(num_stages) for interval in _busy(spans, stage, phases)]
    return Overlaps(handing_on=handing_on, at_once=_depths(busy))


def chrome_trace(spans: Sequence[Span]) -> bytes:
    """Return the spans as a JSON file for a trace viewer (chrome://tracing, Perfetto): a row for each replica."""
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": stage, "args": {"name": f"stage {stage}"}}
        for stage in sorted({span.stage for span in spans})
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": stage, "tid": replica, "args": {"name": f"replica {replica}"}}
        for stage, replica in sorted({(span.stage, span.replica) for span in spans})
    ]
    for span in sorted(spans, key=lambda span: span.start):
        start, length = round((span.start - origin) * 1e6), round((span.end - span.start) * 1e6)
        events.append(
            {
                "ph": "X", "name": f"{span.phase} {span.block}", "cat": span.phase, "ts": start, "dur": length,
                "pid": span.stage, "tid": span.replica, "args": {"block": span.block},
            }
        )  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode() + b"\n"


def _busy(spans: Iterable[Span], stage: int, phases: Collection[str]) -> list[Interval]:
    """Return when a stage was in one of the phases, as intervals that neither touch nor overlap."""
    merged: list[Interval] = []
    for start, end in sorted((s.start, s.end) for s in spans if s.stage == stage and s.phase in phases):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _depths(intervals: Iterable[Interval]) -> dict[int, float]:
    """Return for each number of intervals the seconds during which exactly so many were open; none is left out."""
    edges = sorted(edge for start, end in intervals for edge in ((start, 1), (end, -1)))
    seconds: dict[int, float] = defaultdict(float)
    depth = 0
    for (at, change), (following, _) in pairwise(edges):
        depth += change
        if depth and following > at:
            seconds[depth] += following - at
    return dict(seconds)
