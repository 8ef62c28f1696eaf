"""What died and what is done again because of it, in words: said once, and kept in the ledger."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from cluster.messages import Assignment, Failure
from pipeline.ledger import Ledger
from pipeline.progress import Progress

PREFIX = "recovery."


def describe(failures: Mapping[int, Sequence[Failure]]) -> str:
    """Return the failures, by stage, as one line for each different message, with everybody who died of it.

    `stage 1 replicas 0-3, 7; stage 2 replica 0: worker died: killed by signal 9`
    """
    ranks: dict[str, dict[int, set[int]]] = {}
    for stage in sorted(failures):
        for failure in failures[stage]:
            ranks.setdefault(failure.message, {}).setdefault(stage, set()).add(failure.replica)
    return "\n".join(
        "; ".join(f"stage {stage} {listed('replica', dead)}" for stage, dead in by_stage.items()) + f": {message}"
        for message, by_stage in ranks.items()
    )


def listed(noun: str, numbers: Iterable[int]) -> str:
    """Return `replica 3`, or `replicas 0-3, 7`: consecutive numbers are drawn together."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    spelt = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    many = len(runs) > 1 or any(first != last for first, last in runs)
    return f"{noun}{'s' if many else ''} {spelt}"


def describe_start(assignment: Assignment) -> str:
    """Return what a stage does in an attempt, and above all what of it is done again.

    `stage 1 starts again (attempt 2): input rebuilt by running blocks 0-9, replays blocks 10-13, prunes on from 14`
    """
    own = range(assignment.start, assignment.stop)
    replayed = [block for block in own if block in assignment.committed]
    left = [block for block in own if block not in assignment.committed]
    parts = [_describe_input(assignment)]
    if replayed:
        parts.append(f"replays {listed('block', replayed)}")
    parts.append(f"prunes on from {left[0]}" if left else "sends its output again")
    return f"stage {assignment.stage} starts{_again(assignment.attempt)}: {', '.join(parts)}"


def _again(attempt: int) -> str:
    return f" again (attempt {attempt})" if attempt > 1 else ""


def _describe_input(assignment: Assignment) -> str:
    if assignment.input == "stream":
        return f"input sent by stage {assignment.stage - 1}"
    if assignment.start == 0:
        return "input embedded"
    return f"input rebuilt by running {listed('block', range(assignment.start))}"


class Recoveries:
    """Tells of each recovery, and keeps it in the ledger as note `recovery.N`: what died, what is done again.

    N goes on from where an earlier coordinator has left it. The note is written when something dies and written
    anew, with more in it, when each of the stages concerned starts again.
    """

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self._ledger, self._progress = ledger, progress
        taken = [int(name.removeprefix(PREFIX)) for name in ledger.notes if name.startswith(PREFIX)]
        self._next = max(taken, default=0) + 1
        self._pending: dict[int, str] = {}
        """The note that a stage's next start belongs to."""

    def open(self, stages: Iterable[int], cause: str) -> None:
        """Tell what has happened to some stages, each of which is to be started again or has nothing left to do."""
        name = f"{PREFIX}{self._next}"
        self._next += 1
        self._pending |= dict.fromkeys(stages, name)
        self._progress.say(cause)
        self._ledger.record(name, {"cause": cause, "redone": []})

    def redone(self, stage: int, what: str) -> None:
        """Tell how a stage goes on; says nothing of a stage that nothing has happened to."""
        name = self._pending.pop(stage, None)
        if name is None:
            return
        self._progress.say(what)
        note = self._ledger.notes[name]
        assert isinstance(note, dict), note
        redone = note["redone"]
        assert isinstance(redone, list), note
        extended: list[JsonValue] = [*redone, what]
        self._ledger.record(name, {**note, "redone": extended})
