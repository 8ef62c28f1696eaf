"""What the command shows: lines for logs, a bar on a terminal, a summary at the end."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from pydantic import JsonValue
from rich.console import Console

from cluster.console import LiveProgress, PlainProgress, choose_progress, show_report, show_table
from pipeline.report import Report, Smaller

REPORT = Report(
    sparsity="0.5", pruned_weights=53_084, prunable_weights=106_168, block_sparsity=[0.5, 0.5], mean_error=0.01234,
    perplexity_before=27.43, perplexity_after=51.94,
    seconds={"read": 1.0, "collect": 20.0, "prune": 61.0, "commit": 2.0, "propagate": 10.0},
    forward_equivalents=9.4, peak_host_bytes=1_234_000_000, peak_device_bytes=0,
    notes={"damping": 0.1, "row_sparsity_min": 0.38},
    linears={"0.mlp.up_proj": {"damping": 0.1}},
    peaks={"host": {"prune": 1_234_000_000}, "device": {}},
    traffic={"weights_read": 0.0, "waited_for_weights": 1.5, "waited_for_hidden": 0.5},
    planned={"host_bytes": {"planned": 1.2e9, "measured": 1.234e9, "ratio": 1.028}},
)  # fmt: skip


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(shown: io.StringIO) -> Console:
    """A console that is no terminal, narrower than what is said."""
    return Console(file=shown, width=40, force_terminal=False)


@pytest.fixture
def terminal(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=shown, width=160, force_terminal=True)


def ticking(*seconds: float) -> Iterator[float]:
    return iter(seconds)


def test_a_terminal_gets_a_bar_and_a_log_gets_lines(log: Console, terminal: Console) -> None:
    assert isinstance(choose_progress(log), PlainProgress)
    assert isinstance(choose_progress(terminal), LiveProgress)


def test_a_log_says_after_each_block_how_long_the_rest_will_take(log: Console, shown: io.StringIO) -> None:
    clock = ticking(100.0, 110.0, 130.0, 133.0)
    progress = PlainProgress(log, clock=lambda: next(clock))
    progress.begin("prune", 4, 1)
    progress.phase(1, "collect")
    progress.figures({"error": 0.5})
    progress.advance(1, "error 0.0100, 10 s")
    progress.advance(2, "error 0.0200, 20 s")
    progress.end()
    assert shown.getvalue().splitlines() == [
        "prune: 3 of 4 blocks to do",
        "prune: block 2/4 error 0.0100, 10 s (20 s left)",
        "prune: block 3/4 error 0.0200, 20 s (15 s left)",
        "prune: done in 33 s",
    ]


def test_what_looks_like_markup_is_said_as_it_is(log: Console, terminal: Console, shown: io.StringIO) -> None:
    for progress in (PlainProgress(log), LiveProgress(terminal)):
        progress.say("/data/[bold]x[/bold]/ and [/]")
        assert "/data/[bold]x[/bold]/ and [/]" in shown.getvalue()
        shown.truncate(0)


def test_a_bar_shows_blocks_phase_figures_and_memory(terminal: Console, shown: io.StringIO) -> None:
    progress = LiveProgress(terminal)
    progress.begin("prune", 30, 4)
    progress.phase(4, "collect")
    progress.end()
    assert "prune" in shown.getvalue()
    assert "4/30" in shown.getvalue()
    assert "collecting block 5" in shown.getvalue()
    assert "peak " in shown.getvalue()
    progress.begin("prune", 30, 4)
    progress.figures({"error": 0.01234567, "sparsity": 0.5})
    progress.end()
    assert "error 0.01235  sparsity 0.5" in shown.getvalue()
    progress.begin("prune", 30, 4)
    progress.advance(4, "error 0.0200, 20 s")
    progress.say("perplexity before: 27.43")
    progress.end()
    assert "5/30" in shown.getvalue()
    assert "error 0.0200, 20 s" in shown.getvalue()
    assert "perplexity before: 27.43" in shown.getvalue()


def test_an_unknown_phase_is_shown_by_its_name(terminal: Console, shown: io.StringIO) -> None:
    progress = LiveProgress(terminal)
    progress.begin("verify", 3, 0)
    progress.phase(2, "verify")
    progress.end()
    assert "verify block 3" in shown.getvalue()


def test_a_new_bar_ends_the_one_before_it(terminal: Console, shown: io.StringIO) -> None:
    progress = LiveProgress(terminal)
    progress.begin("evaluate before", 3, 0)
    progress.begin("prune", 3, 0)  # rich refuses a second live display
    progress.end()
    assert shown.getvalue().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h") == 2


def test_events_without_a_bar_are_harmless(terminal: Console, shown: io.StringIO) -> None:
    progress = LiveProgress(terminal)
    progress.phase(0, "read")
    progress.figures({"error": 1.0})
    progress.advance(0, "")
    progress.end()
    assert shown.getvalue() == ""


def summary(report: Report, shown: io.StringIO) -> str:
    show_report(Console(file=shown, width=120), report, "runs/x", "models/y")
    return shown.getvalue()


def test_the_summary_says_what_was_done_what_it_cost_and_what_is_next(shown: io.StringIO) -> None:
    text = summary(REPORT, shown)
    for fact in (
        "50.0000% of 106,168 weights (asked: 0.5)",
        "0.0123 (relative, of each pruned block's output)",
        "27.43 before, 51.94 after",
        "1 min 34 s: read 1.0 s, collect 20 s, prune 1 min 1 s, commit 2.0 s, propagate 10 s",
        "9.40 forward passes of the calibration set",
        "host 1.23 GB",
        "damping",
        "row sparsity min",
        "Inference is as fast as before",
        "Model: runs/x/model",
        "Next:  secateur verify runs/x --source models/y",
    ):
        assert fact in text
    assert "device" not in text


def test_the_summary_leaves_out_what_was_not_measured(shown: io.StringIO) -> None:
    text = summary(replace(REPORT, perplexity_before=None, perplexity_after=None, peak_device_bytes=7_000_000), shown)
    assert "perplexity" not in text
    assert "host 1.23 GB, device 7 MB" in text


@pytest.mark.parametrize(
    ("sparsity", "honest"),
    [
        ("0.7", "GPUs and the usual runtimes do not skip scattered zeros"),
        ("2:4", "NVIDIA GPUs from Ampere on can run 2:4 matrices"),
        ("3:8", "No common hardware accelerates 3:8: only 2:4 has kernels."),
    ],
)
def test_the_summary_is_honest_about_speed(sparsity: str, honest: str, shown: io.StringIO) -> None:
    text = summary(replace(REPORT, sparsity=sparsity), shown)
    assert honest in text
    assert "The files are as large as before" in text


def test_a_table_shows_every_row(log: Console, shown: io.StringIO) -> None:
    show_table(log, "facts", [("python", "3.11"), ("[odd] name", "[value]")])
    assert "facts" in shown.getvalue()
    assert "python" in shown.getvalue()
    assert "[odd] name" in shown.getvalue()
    assert "[value]" in shown.getvalue()


def test_a_summary_says_between_what_the_blocks_lie_where_they_differ(log: Console, shown: io.StringIO) -> None:
    show_report(log, REPORT, "runs/demo", "models/demo")
    assert "by block" not in shown.getvalue()
    show_report(log, replace(REPORT, block_sparsity=[0.43, 0.5, 0.57]), "runs/demo", "models/demo")
    assert "by block" in shown.getvalue()
    assert "43.00% to 57.00%" in shown.getvalue()


def test_a_summary_of_a_smaller_model_says_what_is_left(shown: io.StringIO) -> None:
    blocks: dict[str, JsonValue] = {"of": 30, "dropped": [4, 7, 9], "parameters_before": 134_515_008}
    smaller = Smaller(asked=0.1, blocks=blocks, num_blocks=27, parameters=123_895_872, num_bytes=247_791_744)
    console = Console(file=shown, width=160, force_terminal=False)
    show_report(console, replace(REPORT, smaller=smaller, prunable_weights=0, block_sparsity=[0.0] * 27), "run", "in")
    said = " ".join(shown.getvalue().split())
    assert "blocks 27 of 30 are left (asked: 10.00% less)" in said
    assert "parameters 123,895,872 of 134,515,008, 248 MB" in said
    assert "- The model is really smaller: 27 of 30 blocks are left." in said
    assert "zeros" not in said
    assert "asked: 0.5" not in said
