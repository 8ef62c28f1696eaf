"""Results of the quality bench: one line of JSON each, found again by all that could change them."""

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.quality.plan import Run
from tests.bench.quality.weighing import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run gave."""

    perplexity: dict[str, float]
    """By name of the text."""

    seconds: float
    """Pruning: collecting, pruning, committing and propagating all blocks."""

    passes: float
    """The same in forward passes of all calibration sequences."""

    peak: int
    """Bytes of memory beyond the imports, at the highest, while pruning."""

    wall: float
    """Seconds the bench spent on the run, evaluation included."""

    elapsed: float | None = None
    """Seconds of the run's process from its imports on: all of `seconds`, and choosing which blocks go before."""

    weight: Weight | None = None
    """Of a model that is really smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run that was made."""

    run: Run | None
    """None for the dense model."""

    facts: dict[str, Any]
    """All else that decides the figures: settings, model, tokens, versions, threads."""

    code: str
    """Digest of the code it was made with."""

    figures: Figures
    commit: str
    """Commit that was checked out; `-dirty` where files differed from it."""

    day: str
    """When it was made, YYYY-MM-DD."""


class Results:
    """The results in a file, to which every new one is added at once and durably."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all = [_result_of(json.loads(line)) for line in _whole_lines(path)]

    def add(self, result: Result) -> None:
        """Append one result."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(result)

    def find(self, run: Run | None, facts: Mapping[str, Any], code: str | None) -> Result | None:
        """Return the latest result of a run under the same circumstances; `code` None takes those of any code."""
        wanted = json.loads(json.dumps(facts))
        found = (r for r in reversed(self.all) if r.run == run and r.facts == wanted and code in (None, r.code))
        return next(found, None)

    def expected(self, run: Run | None) -> float | None:
        """Return how long a run may take, in seconds of `wall`; None while no run like it is known.

        As runs of its recipe and size did; else as all of its size did; else as others did, by number of tokens.
        """
        if run is None:
            return None
        made = [(r.run, r.figures.wall) for r in self.all if r.run is not None]
        of_size = [(other.recipe, wall) for other, wall in made if other.size == run.size]
        walls = (
            [wall for recipe, wall in of_size if recipe == run.recipe]
            or [wall for _, wall in of_size]
            or [wall * run.num_tokens / other.num_tokens for other, wall in made]
        )
        return sum(walls) / len(walls) if walls else None


def code_digest(root: Path) -> str:
    """Return a digest of a package's code that comments, docstrings and formatting do not change."""
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [s for s in node.body if not _is_text(s)]
        sha.update(f"{path.relative_to(root)} {ast.dump(tree)}".encode())
    return sha.hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _whole_lines(path: Path) -> Iterable[str]:
    """Return the file's lines, having cut off one that was not written to its end."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return whole.decode().splitlines()


def _result_of(data: dict[str, Any]) -> Result:
    run = None if data["run"] is None else Run(**data["run"])
    weight = None if data["figures"].get("weight") is None else Weight(**data["figures"]["weight"])
    return Result(**{**data, "run": run, "figures": Figures(**{**data["figures"], "weight": weight})})
