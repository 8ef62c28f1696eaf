"""What the command shows: live progress on a terminal, plain lines elsewhere, summaries at the end.

Everything goes to standard error, so that `--json` leaves one object alone on standard output.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from pipeline.block_widths import width_in_words
from pipeline.human import human_bytes, human_seconds
from pipeline.meter import peak_host_bytes
from pipeline.planning.plan import Plan
from pipeline.progress import Progress
from pipeline.report import Report, Smaller, guidance

PHASE_NAMES = {"read": "reading", "collect": "collecting", "prune": "pruning", "commit": "committing"}


def choose_progress(console: Console) -> "PlainProgress | LiveProgress":
    """Return live bars on a terminal, plain lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """Show progress; a bar that an error has left is taken down, so that the terminal has its cursor back."""
    progress = choose_progress(console)
    try:
        yield progress
    finally:
        if isinstance(progress, LiveProgress):
            progress.end()


class PlainProgress:
    """One line a block, with the time left: for logs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._task, self._total, self._start = "", 0, 0.0
        self._first, self._done = 0, 0

    def begin(self, task: str, total: int, done: int) -> None:
        """Say what begins."""
        self._task, self._total, self._start = task, total, self._clock()
        self._first = self._done = done
        self.say(f"{task}: {total - done} of {total} blocks to do")

    def phase(self, block: int, name: str) -> None:
        """Say nothing: phases are too short for a log."""

    def figures(self, figures: Mapping[str, float]) -> None:
        """Say nothing: figures change too often for a log."""

    def advance(self, block: int, summary: str) -> None:
        """Say that a block is done, and how long the rest will take; stages end blocks out of order."""
        self._done += 1
        left = (self._clock() - self._start) / (self._done - self._first) * (self._total - self._done)
        self.say(f"{self._task}: block {block + 1}/{self._total} {summary} ({human_seconds(left)} left)")

    def end(self) -> None:
        """Say how long the task took."""
        self.say(f"{self._task}: done in {human_seconds(self._clock() - self._start)}")

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A bar with blocks, phase, figures, time left and peak memory."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def begin(self, task: str, total: int, done: int) -> None:
        """Show a bar."""
        self.end()
        self._bars = Bars(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[memory]}"),
            console=self._console,
        )  # fmt: skip
        self._bars.start()
        self._task = self._bars.add_task(task, total=total, completed=done, now="", memory="")

    def phase(self, block: int, name: str) -> None:
        """Show the phase."""
        self._update(now=f"{PHASE_NAMES.get(name, name)} block {block + 1}")

    def figures(self, figures: Mapping[str, float]) -> None:
        """Show figures of the phase."""
        self._update(now="  ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def advance(self, block: int, summary: str) -> None:
        """Move the bar by one block."""
        self._update(now=summary, advance=1)

    def end(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def _update(self, now: str, advance: int = 0) -> None:
        if self._bars is not None:
            memory = f"peak {human_bytes(peak_host_bytes())}"
            self._bars.update(self._task, advance=advance, now=now, memory=memory)


def show_report(console: Console, report: Report, run_directory: str, source: str) -> None:
    """Print the closing summary of a run: what was done, what it cost, what to do next."""
    table = Table(title="secateur: run finished", show_header=False, title_justify="left", box=None)
    for name, value in _report_rows(report):
        table.add_row(name, value)
    console.print(table)
    for line in guidance(report):
        console.print(f"  - {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Model: {run_directory}/model", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Next:  secateur verify {run_directory} --source {source}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _report_rows(report: Report) -> list[tuple[str, str]]:
    rows = [
        *_smaller_rows(report),
        *_sparsity_row(report),
        *_blocks_row(report),
        *_error_row(report),
    ]
    if report.perplexity_before is not None and report.perplexity_after is not None:
        rows.append(("perplexity", f"{report.perplexity_before:.2f} before, {report.perplexity_after:.2f} after"))
    phases = ", ".join(f"{name} {human_seconds(spent)}" for name, spent in report.seconds.items())
    rows += [
        ("time", f"{human_seconds(sum(report.seconds.values()))}: {phases}"),
        ("cost", _cost(report.forward_equivalents)),
        ("peak memory", f"host {human_bytes(report.peak_host_bytes)}" + _device(report)),
        *_planned_rows(report),
    ]
    return rows + [(name.replace("_", " "), f"{value:.4g}") for name, value in report.notes.items()]


def _smaller_rows(report: Report) -> list[tuple[str, str]]:
    """Say what is gone for good, where something is."""
    smaller = report.smaller
    if smaller is None:
        return []
    before = smaller.blocks["parameters_before"]
    return [
        ("blocks", f"{smaller.num_blocks} of {smaller.blocks['of']} are left (asked: {smaller.asked:.2%} less)"),
        *_neurons_row(smaller),
        ("parameters", f"{smaller.parameters:,} of {before:,}, {human_bytes(smaller.num_bytes)}"),
    ]


def _neurons_row(smaller: Smaller) -> list[tuple[str, str]]:
    width, heads = smaller.blocks.get("width"), f", and {smaller.heads}" if smaller.heads else ""
    left = f"of {smaller.blocks.get('neurons')} are left in every block{heads}"
    return [] if width is None else [("neurons", f"{width_in_words(width)} {left}")]


def _sparsity_row(report: Report) -> list[tuple[str, str]]:
    """Say what was masked, where something was to be."""
    masked = f"{report.achieved:.4%} of {report.prunable_weights:,} weights (asked: {report.sparsity})"
    return [("sparsity", masked)] if report.prunable_weights else []


def _error_row(report: Report) -> list[tuple[str, str]]:
    """Say how far the outputs of pruned blocks are off, where some were pruned."""
    error = f"{report.mean_error:.4f} (relative, of each pruned block's output)"
    return [("mean block error", error)] if report.prunable_weights or report.mean_error else []


def _blocks_row(report: Report) -> list[tuple[str, str]]:
    """Say between what the blocks lie, where they differ."""
    least, most = min(report.block_sparsity), max(report.block_sparsity)
    return [("by block", f"{least:.2%} to {most:.2%}")] if least < most else []


def _planned_rows(report: Report) -> list[tuple[str, str]]:
    """Say how the run kept to its plan, where it had one."""
    shown = {
        "host_bytes": human_bytes,
        "device_bytes": human_bytes,
        "spool_bytes": human_bytes,
        "seconds": human_seconds,
    }
    parts = [
        f"{name.removesuffix('_bytes')} {show(figures['measured'])} of {show(figures['planned'])}"
        for name, show in shown.items()
        if (figures := report.planned.get(name)) is not None
    ]
    waited = report.traffic["waited_for_weights"] + report.traffic["waited_for_hidden"]
    rows = [("planned", ", ".join(parts))] if parts else []
    return [*rows, ("waited for disk", human_seconds(waited))]


def _cost(forward_equivalents: float | None) -> str:
    if forward_equivalents is None:
        return "not measured: no block was propagated"
    return f"{forward_equivalents:.2f} forward passes of the calibration set"


def _device(report: Report) -> str:
    return f", device {human_bytes(report.peak_device_bytes)}" if report.peak_device_bytes else ""


def show_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print facts, one a row."""
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


TIERS = {
    "device": "where blocks run", "pinned": "in page-locked host memory", "host": "in host memory", "disk": "on disk",
}  # fmt: skip


AHEAD = {
    0: "each block's weights when they are needed",
    1: "the next block's weights ahead",
    2: "the weights of the next two blocks ahead",
}


def show_plan(console: Console, plan: Plan) -> None:
    """Print what each phase of a run needs, the totals, and what was chosen; then why it is refused, if it is."""
    choice = plan.choice
    at_once = ", each block propagated while the next one is collected" if choice.fused else ""
    facts = [
        ("model", f"{plan.model_type}, {plan.num_blocks} blocks of {plan.block_weights:,} prunable weights"),
        (
            "computes",
            f"on {plan.device} in {plan.dtype}, {plan.forward_passes:.3g} forward passes of the calibration set",
        ),
        ("keeps", f"hidden states {TIERS[choice.tier]}{at_once}"),
        ("reads", AHEAD[choice.ahead]),
        ("limits", ", ".join(f"{place} {human_bytes(size)}" for place, size in plan.limits.items())),
        ("output", human_bytes(plan.output_bytes)),
    ]
    if plan.part_gone or plan.part_idle:
        facts.append(("left", plan.left))
    if plan.num_trials:
        facts.append(("tries", f"{plan.num_trials} splits between whole blocks and neurons, by a run each (trials)"))
    if plan.seconds is not None:
        facts.append(("time", f"{human_seconds(plan.seconds)}, most of it spent {_spent(plan.bottleneck)}"))
    show_table(console, "secateur: plan", facts)
    console.print(_phase_table(plan))
    for reason in plan.refused:
        console.print(f"refused: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)


def _phase_table(plan: Plan) -> Table:
    """Peaks of memory by phase, and what a phase takes over the whole run."""
    table = Table("phase", "device", "host", "spool", "read", "written", "TFLOP", "time", "slowest", box=None)
    for phase in plan.phases:
        sizes = (phase.device_bytes, phase.host_bytes, phase.spool_bytes, phase.bytes_read, phase.bytes_written)
        _add_phase(table, phase.name, sizes, phase.flops, phase.seconds, phase.bottleneck)
    sizes = (plan.device_bytes, plan.host_bytes, plan.spool_bytes, plan.bytes_read, plan.bytes_written)
    _add_phase(table, "in all", sizes, plan.flops, plan.seconds, plan.bottleneck)
    return table


def _add_phase(
    table: Table, name: str, sizes: Sequence[int], flops: float, seconds: float | None, bottleneck: str | None
) -> None:
    shown = (human_bytes(size) if size else "" for size in sizes)
    time = "" if seconds is None else human_seconds(seconds)
    table.add_row(name, *shown, f"{flops / 1e12:.3g}" if flops else "", time, bottleneck or "")


def _spent(bottleneck: str | None) -> str:
    return "on disk" if bottleneck == "disk" else str(bottleneck)
