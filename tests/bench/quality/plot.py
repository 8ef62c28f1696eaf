"""The quality bench's results as a picture: perplexity over sparsity, by pattern, and over what pruning costs."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from tests.bench.quality.plan import Amount, spelled
from tests.bench.quality.tables import Board, Row, run_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which is faint on white."""

MARKERS = "osD^vP*Xd<>"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "svg.hashsalt": "quality",  # names in the file do not change from one drawing to the next
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


class Look(NamedTuple):
    """How a recipe is drawn."""

    colour: str
    marker: str


def draw(board: Board, path: Path) -> None:
    """Draw means over the seeds, at the first size, as an SVG file: the same bytes for the same results."""
    looks = looks_of(board)
    fractions: dict[Amount, float] = {amount: amount for amount in board.sparsities if isinstance(amount, float)}
    groups = [amount for amount in board.sparsities if isinstance(amount, str)]
    patterns: dict[Amount, float] = {amount: float(i) for i, amount in enumerate(groups)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 3))
        draw_places(board, left, looks, fractions, "-")
        finish(board, left, "fraction removed")
        left.set_ylabel(f"perplexity on {board.bench.in_domain} (log)")
        draw_places(board, middle, looks, patterns, "")
        finish(board, middle, "kept of each group")
        draw_cost(board, right, looks)
        figure.legend(handles=legend(board, looks), loc="outside right center", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def legend(board: Board, looks: Mapping[str, Look]) -> list[Line2D]:
    """Return an entry for every recipe with results, for the marks and for the dense model."""
    shown = {run_of(result).recipe for result in board.results if result.run is not None}
    entries = [
        Line2D([], [], color=look.colour, marker=look.marker, lw=1.2, label=recipe)
        for recipe, look in looks.items()
        if recipe in shown
    ]
    mark = Line2D([], [], color="black", marker="_", ms=12, ls="", label="half-way to dense")
    return [*entries, mark, Line2D([], [], color="grey", ls=":", label="dense")]


def looks_of(board: Board) -> dict[str, Look]:
    """Return how every recipe is drawn: colour and marker together are its own."""
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    return {name: Look(*style) for name, style in zip(board.bench.recipes, styles, strict=False)}


def mean_of(board: Board, row: Row) -> float:
    """Return a row's mean perplexity on the text in domain."""
    return row.mean(lambda figures: figures.perplexity[board.bench.in_domain])


def draw_places(board: Board, axes: Axes, looks: Mapping[str, Look], places: Mapping[Amount, float], line: str) -> None:
    """Draw perplexity at the places of some sparsities on the x axis, and the marks to reach as black bars."""
    found: dict[str, list[tuple[float, float]]] = {}
    for amount, place in places.items():
        for row in board.rows(board.bench.sizes[0], amount):
            found.setdefault(row.recipe, []).append((place, mean_of(board, row)))
    for recipe, points in found.items():
        look = looks[recipe]
        axes.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker, ls=line, ms=5, lw=1.2)
    marks = {place: mark for x, place in places.items() if (mark := board.bench.references.mark(x)) is not None}
    axes.scatter(list(marks), list(marks.values()), marker="_", s=300, color="black", zorder=3)
    axes.set_xticks(list(places.values()), [spelled(amount) for amount in places])
    axes.margins(x=0.15)


def draw_cost(board: Board, axes: Axes, looks: Mapping[str, Look]) -> None:
    """Draw perplexity over pruning time at the lowest sparsity there is: the lower left is best."""
    lowest = board.sparsities[0]
    for row in board.rows(board.bench.sizes[0], lowest):
        seconds, look = row.mean(lambda figures: figures.seconds), looks[row.recipe]
        axes.plot([seconds], [mean_of(board, row)], color=look.colour, marker=look.marker, ms=7, ls="")
    axes.set_xscale("log")
    finish(board, axes, f"seconds of pruning at {spelled(lowest)} (log)")
    plain(axes.xaxis)


def finish(board: Board, axes: Axes, label: str) -> None:
    """Name the x axis, make that of perplexity logarithmic, and draw the dense model as a dotted line."""
    axes.set_xlabel(label)
    axes.set_yscale("log")
    plain(axes.yaxis)
    if board.dense:
        axes.axhline(board.dense[board.bench.in_domain], color="grey", ls=":", lw=1)


def plain(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
