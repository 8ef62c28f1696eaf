"""The quality bench's results as Markdown: a table for every sparsity, one for the calibration's size."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.quality.plan import Amount, Bench, Run, spelled
from tests.bench.quality.results import Figures, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of a recipe at one sparsity and one size."""

    recipe: str
    sparsity: Amount
    by_seed: dict[int, Figures]

    def over_seeds(self, text: str) -> str:
        """Return the mean perplexity on a text and, of several seeds, the range."""
        return spread([figures.perplexity[text] for figures in self.by_seed.values()])

    def mean(self, of: Callable[[Figures], float]) -> float:
        """Return the mean of a figure over the seeds."""
        return statistics.mean(of(figures) for figures in self.by_seed.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """All that there is to tell."""

    bench: Bench
    results: Sequence[Result]
    """One for every run that was made, as the bench has it now."""

    @property
    def dense(self) -> dict[str, float]:
        """Perplexity of the dense model by text; empty while it is not known."""
        return next((r.figures.perplexity for r in self.results if r.run is None), {})

    def rows(self, size: str, sparsity: Amount) -> list[Row]:
        """Return the recipes with results, the best first: by the first seed known, on the text in domain."""
        by_recipe: dict[str, dict[int, Figures]] = {}
        for result in sorted((r for r in self.results if r.run is not None), key=lambda r: run_of(r).seed):
            run = run_of(result)
            if (run.size, run.sparsity) == (size, sparsity):
                by_recipe.setdefault(run.recipe, {})[run.seed] = result.figures
        rows = [Row(recipe=name, sparsity=sparsity, by_seed=found) for name, found in by_recipe.items()]
        return sorted(rows, key=lambda row: next(iter(row.by_seed.values())).perplexity[self.bench.in_domain])

    @property
    def is_weighed(self) -> bool:
        """Whether models were made that are really smaller."""
        return any(result.figures.weight is not None for result in self.results)

    @property
    def sparsities(self) -> list[Amount]:
        """Sparsities with results, fractions first, each kind in its own order."""
        found = {run_of(r).sparsity for r in self.results if r.run is not None}
        return sorted(found, key=lambda amount: (isinstance(amount, str), str(amount)))


def board_of(bench: Bench, results: Sequence[Result], fingerprint: str) -> Board:
    """Choose what to show of a model: the latest result of every run, if its recipe is still what the bench calls so.

    All on the same windows of the same texts, those of the last result.
    """
    of_model = [result for result in results if result.facts["model"] == fingerprint]
    current = [
        result
        for result in of_model
        if result.facts["evaluate"] == of_model[-1].facts["evaluate"]
        if result.run is None or is_current(bench, result.run, result.facts)
    ]
    return Board(bench=bench, results=list({result.run: result for result in current}.values()))


def is_current(bench: Bench, run: Run, facts: Mapping[str, Any]) -> bool:
    """Whether a run's recipe is still what the bench calls by its name."""
    return run.recipe in bench.recipes and facts["prune"] == json.loads(json.dumps(bench.prune_of(run)))


def run_of(result: Result) -> Run:
    """Return the run of a result that is not the dense model's."""
    assert result.run is not None
    return result.run


def spread(values: Sequence[float]) -> str:
    """Return the mean and, of several values, the range."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def section(board: Board) -> str:
    """Return all tables, with what they were made of."""
    tables = [sparsity_table(board, sparsity) for sparsity in board.sparsities]
    return "\n\n".join(part for part in (*tables, size_table(board), footer(board)) if part)


def sparsity_table(board: Board, sparsity: Amount) -> str:
    """Return the table of one sparsity, at the first size."""
    bench, rows = board.bench, board.rows(board.bench.sizes[0], sparsity)
    texts = list(bench.evaluate)
    header = [
        "recipe", f"{texts[0]}, seed 0", "the authors' code", *texts, "pruning", "forward passes", "memory",
    ]  # fmt: skip
    lines = [result_line(bench, row, is_best=row is rows[0]) for row in rows]
    known = {row.recipe for row in rows}
    lines += [
        [name, "", f"{figures[sparsity]:.2f}", *[""] * (len(texts) + 3)]
        for name, figures in bench.references.recipes.items()
        if sparsity in figures and name not in known
    ]
    return f"{headline(board, sparsity, rows)}\n\n{markdown(header, lines)}" if rows else ""


def result_line(bench: Bench, row: Row, *, is_best: bool) -> list[str]:
    """Return the cells of one recipe."""
    first = row.by_seed.get(0)
    own = "" if first is None else f"{first.perplexity[bench.in_domain]:.2f}"
    reference = bench.references.recipes.get(row.recipe, {}).get(row.sparsity)
    return [
        row.recipe,
        f"**{own}**" if own and is_best else own,
        "" if reference is None else f"{reference:.2f}",
        *(row.over_seeds(text) for text in bench.evaluate),
        f"{row.mean(lambda figures: figures.seconds):.0f} s",
        f"{row.mean(lambda figures: figures.passes):.1f}",
        f"{max(figures.peak for figures in row.by_seed.values()) / 1e9:.2f} GB",
    ]


def headline(board: Board, sparsity: Amount, rows: Sequence[Row]) -> str:
    """Return a sparsity's heading: the mark to reach, and which recipes reach it."""
    references, in_domain = board.bench.references, board.bench.in_domain
    best, mark = references.best(sparsity), references.mark(sparsity)
    if best is None or mark is None:
        return f"**{spelled(sparsity)}**"
    at_seed_0 = {row.recipe: row.by_seed[0].perplexity[in_domain] for row in rows if 0 in row.by_seed}
    reached = [recipe for recipe, perplexity in at_seed_0.items() if perplexity <= mark]
    by = f"reached by {'; '.join(reached)}" if reached else "reached by none"
    return (
        f"**{spelled(sparsity)}**: the best of the authors' code leaves {best:.2f}; half of its gap to the dense model "
        f"would be {mark:.1f}, {by}."
    )


def size_table(board: Board) -> str:
    """Return how recipes fare with more calibration, where they were run at several sizes with the same seeds."""
    sizes, texts = board.bench.sizes, list(board.bench.evaluate)
    lines = []
    for sparsity in board.sparsities:
        by_size = [{row.recipe: row for row in board.rows(size, sparsity)} for size in sizes]
        for recipe in board.bench.recipes:
            rows = [found[recipe] for found in by_size if recipe in found]
            seeds = set.intersection(*(set(row.by_seed) for row in rows)) if len(rows) == len(sizes) > 1 else set()
            if seeds:
                lines.append([recipe, spelled(sparsity), *size_cells(rows, sorted(seeds), texts)])
    header = ["recipe", "sparsity", *(f"{text}, {size}" for text in texts for size in sizes)]
    header += [f"pruning, {size}" for size in sizes]
    return f"**More calibration** (the same seeds at every size):\n\n{markdown(header, lines)}" if lines else ""


def size_cells(rows: Sequence[Row], seeds: Sequence[int], texts: Sequence[str]) -> list[str]:
    """Return the cells of one recipe in the table of sizes: a row of results for each size."""
    figures = [[row.by_seed[seed] for seed in seeds] for row in rows]
    perplexities = [spread([f.perplexity[text] for f in of_size]) for text in texts for of_size in figures]
    return perplexities + [f"{statistics.mean(f.seconds for f in of_size):.0f} s" for of_size in figures]


def footer(board: Board) -> str:
    """Return what the tables were made of."""
    dense = ", ".join(f"{value:.2f} on {text}" for text, value in board.dense.items())
    commits = ", ".join(sorted({result.commit for result in board.results}))
    days = sorted({result.day for result in board.results})
    threads = sorted({str(result.facts["compute"]["threads"]) for result in board.results})
    torch = sorted({str(result.facts["versions"]["torch"]) for result in board.results})
    return (
        f"Dense: {dense or 'not measured'}. Several seeds: mean and range. Pruning, forward passes: means over the "
        f"seeds; memory beyond the imports: the most. Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} at "
        f"commit {commits} (threads: {', '.join(threads)}; torch {', '.join(torch)})."
    )


def marks_of(bench: Bench) -> tuple[str, str]:
    """Return what begins and what ends a bench's tables in the README."""
    return f"<!-- {bench.name}:begin -->", f"<!-- {bench.name}:end -->"


def rewrite(readme: Path, marks: tuple[str, str], content: str) -> None:
    """Put new content between the two marks of a README; raises ValueError where it has not both, in order."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise ValueError(f"{readme} has not the marks {' and '.join(marks)}, in this order; put them where they go")
    readme.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")
