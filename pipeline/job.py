"""What a job holds open while it runs, however its blocks are spread: source, calibration, ledger; and its end."""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from pydantic import JsonValue

from pipeline.allocation import Allocation
from pipeline.assemble import assemble
from pipeline.calibration import CalibrationSet, load_calibration, require_positions
from pipeline.checkpoint import Checkpoint
from pipeline.choose_shape import Chosen, choose_shape
from pipeline.config import RunConfig, resolved
from pipeline.devices import choose_device, choose_dtype, empty_cache
from pipeline.durable import remove_leftovers, write_atomically
from pipeline.errors import RunStopped
from pipeline.evaluate import evaluate, load_windows
from pipeline.hub import fetch_model
from pipeline.ledger import Ledger
from pipeline.memory import Memory
from pipeline.narrower import narrowed
from pipeline.order import Order
from pipeline.own_text import WrittenByModel
from pipeline.planning.comparison import Measured, compare
from pipeline.planning.plan import Plan
from pipeline.progress import Progress, StopAsked
from pipeline.prunable import require_prunable
from pipeline.records import Header
from pipeline.remains import neurons_as_data
from pipeline.report import REPORT, Report, Smaller, build_report
from pipeline.self_calibration import self_calibration
from pipeline.shape import Shape
from pipeline.skeleton import Skeleton
from pipeline.sources import describe
from pipeline.sparsity import SemiStructured
from pipeline.try_splits import Prune

Scheme = Mapping[str, JsonValue]
"""What of the way blocks and sequences are spread determines the bytes; empty where it is as in one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The model to prune, and what it is calibrated on."""

    config: RunConfig
    checkpoint: Checkpoint
    skeleton: Skeleton
    calibration: CalibrationSet
    device_type: str
    """What the blocks run on: `cpu`, `cuda`, …; on a cluster that of the workers, not of this process."""

    chosen: Chosen | None = None
    """How the model is made smaller, where the recipe asks for that: checkpoint and skeleton are then of what is left,
    and blocks go by their numbers there."""

    @property
    def shape(self) -> Shape | None:
        """Of the output, where it is smaller."""
        return None if self.chosen is None else self.chosen.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A source with the ledger of its run."""

    source: Source
    ledger: Ledger
    memory: Memory
    plan: Plan | None
    """What the run is expected to take; None on a cluster, whose workers have memory of their own."""

    model_directory: Path
    progress: Progress
    stop_asked: StopAsked
    is_whole: bool
    """Whether the run began in this session: only then is its duration to be compared with the plan's."""

    began: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.source.config

    @property
    def skeleton(self) -> Skeleton:
        """The source model without its weights."""
        return self.source.skeleton

    def stop_if_asked(self) -> None:
        """Raise RunStopped, between blocks, when a stop was asked for."""
        if self.stop_asked():
            raise RunStopped(
                f"stopped as asked: {len(self.ledger.commits)} of {self.skeleton.num_blocks} blocks are committed in "
                f"{self.config.output}. Go on with: secateur run {self.config.output}"
            )


@contextmanager
def open_source(
    config: RunConfig, progress: Progress, stop_asked: StopAsked, prune: Prune, device_type: str | None = None
) -> Iterator[Source]:
    """Open the model and load the calibration tokens; blocks run here, or on workers with devices of this type.

    Where the model is to write its calibration text, or blocks are to be dropped, that is settled here, once, in the
    run directory, whose lock the caller holds. prune: carries out a run, where several are tried first. Raises
    ConfigError before that where this model cannot be pruned as asked, then RunStopped, and BudgetExceeded.
    """
    directory = model_directory_of(config)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    with closing(Checkpoint.open(directory)) as checkpoint:
        asked = config.compute.device if device_type is None else "cpu" if device_type == "cpu" else "auto"
        device = choose_device(asked)
        device_type = device_type or device.type
        dtype = choose_dtype(config.compute.dtype, torch.device(device_type), checkpoint.matrix_dtype())
        skeleton = Skeleton(checkpoint, device, dtype)
        require_positions(config.calibration.tokens, skeleton.num_positions, "calibration.tokens")
        require_prunable(config, skeleton)
        if isinstance(config.calibration.source, WrittenByModel):
            calibration = self_calibration(config, skeleton, progress, stop_asked)
        else:
            calibration = load_calibration(config.calibration, directory, skeleton.vocab_size)
        chosen: Chosen | None = None
        if config.prune.steps.shape is not None:
            depends_on: dict[str, JsonValue] = {
                "source": checkpoint.fingerprint(),
                "calibration": calibration.sha256,
                "compute": _compute(config, device_type, dtype),
            }
            chosen = choose_shape(config, skeleton, calibration.tokens_NT, depends_on, progress, stop_asked, prune)
            skeleton = narrowed(skeleton, chosen.shape)
        yield Source(
            config=config, checkpoint=skeleton.checkpoint, skeleton=skeleton, calibration=calibration,
            device_type=device_type, chosen=chosen,
        )  # fmt: skip


def open_job(
    source: Source,
    memory: Memory,
    progress: Progress,
    stop_asked: StopAsked,
    *,
    scheme: Scheme | None = None,
    plan: Plan | None = None,
) -> Job:
    """Open or begin the ledger of a source's run; the caller holds the run directory's lock."""
    config = source.config
    ledger = Ledger.open(config.output, header_of(source, scheme or {}))
    write_atomically(config.output / "config.yaml", yaml.safe_dump(resolved(config), sort_keys=False).encode())
    model_directory = config.output / "model"
    model_directory.mkdir(exist_ok=True)
    for written_to in (config.output, model_directory, config.output / "report"):
        remove_leftovers(written_to)
    return Job(
        source=source, ledger=ledger, memory=memory, plan=plan, model_directory=model_directory,
        progress=progress, stop_asked=stop_asked, is_whole=not ledger.commits,
    )  # fmt: skip


def finish(job: Job) -> Report:
    """Make the model directory of a job whose blocks are all committed, evaluate it, and write the report."""
    remove_leftovers(job.model_directory)  # of workers that were killed while they wrote
    with job.memory.meter.phase("assemble"):
        assemble(job.skeleton, job.ledger, job.model_directory, provenance(job))
    evaluate_job(job, "after")
    meter = job.memory.meter
    measured = Measured(
        host_bytes=meter.peak_host_bytes,
        device_bytes=meter.peak_device_bytes,
        spool_bytes=job.memory.budget.peak("spool"),
        seconds=time.perf_counter() - job.began if job.is_whole else None,
    )
    comparison = {} if job.plan is None else compare(job.plan, measured)
    report = build_report(job.ledger, job.skeleton.num_blocks, meter, job.memory.traffic, comparison, _smaller(job))
    write_report(job, REPORT, json.dumps(report.as_json(), indent=2).encode() + b"\n")
    return report


def _smaller(job: Job) -> Smaller | None:
    """What a finished model has lost for good, counted from its files; None where nothing was to go."""
    chosen = job.source.chosen
    if chosen is None:
        return None
    with closing(Checkpoint.open(job.model_directory)) as output:
        return Smaller(
            asked=float(job.config.prune.steps.part_removed(job.config.prune.target)),
            blocks=chosen.as_data(),
            num_blocks=job.skeleton.num_blocks,
            parameters=output.numel(),
            num_bytes=output.total_bytes(),
        )


def write_report(job: Job, name: str, content: bytes) -> None:
    """Write one file of the run directory's report."""
    directory = job.config.output / "report"
    directory.mkdir(exist_ok=True)
    write_atomically(directory / name, content)


def model_directory_of(config: RunConfig) -> Path:
    """Return the directory of the model to prune, fetching it from the hub if asked."""
    if config.model.path is not None:
        return config.model.path
    assert config.model.hub is not None
    return fetch_model(config.model.hub, config.model.revision)


def order_of(config: RunConfig, allocation: Allocation, shape: Shape | None) -> Order:
    """Return what a configuration asks of every block; shape: of the output, where it is smaller."""
    prune = config.prune
    return Order(
        recipe=prune.steps, allocation=allocation, skip=prune.skip,
        batch=config.compute.batch, width=None if shape is None else shape.width,
        heads=None if shape is None else shape.heads,
    )  # fmt: skip


def header_of(source: Source, scheme: Scheme) -> Header:
    """Return what determines the output's bytes: a resumed run must agree with it."""
    target, skeleton, config = source.config.prune.target, source.skeleton, source.config
    allocation = config.prune.allocation
    prune: dict[str, JsonValue] = {
        "sparsity": str(target) if isinstance(target, SemiStructured) else target.ratio,
        "recipe": config.prune.steps.as_data(),
        "within_block": config.prune.within_block,
        "skip": list(config.prune.skip),
        **({"allocation": allocation.model_dump(mode="json")} if allocation.needs_survey else {}),
    }
    shape: Scheme = {} if source.shape is None else {"shape": source.shape.as_data()}
    compute = _compute(config, source.device_type, skeleton.dtype)
    return Header(
        config={"prune": prune, "compute": compute, **shape, **scheme},
        source=skeleton.checkpoint.fingerprint(),
        calibration=source.calibration.sha256,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("secateur", "torch", "transformers")},
        },
    )


def _compute(config: RunConfig, device_type: str, dtype: torch.dtype) -> dict[str, JsonValue]:
    """What rounding depends on."""
    return {
        "device": device_type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": config.compute.batch,
        **({} if config.compute.threads is None else {"threads": config.compute.threads}),
    }


def provenance(job: Job) -> dict[str, JsonValue]:
    """Return what the model directory says about how it was made; it names no path, for it may be published."""
    commits = job.ledger.commits.values()
    linears = [record for commit in commits for record in commit.linears.values()]
    calibration = job.source.calibration
    return {
        "tool": f"secateur {version('secateur')}",
        "settings": job.ledger.header.config,
        "calibration": {"shape": list(calibration.tokens_NT.shape), "sha256": calibration.sha256},
        "source_sha256": job.ledger.header.source,
        "pruned_weights": sum(record.pruned for record in linears),
        "prunable_weights": sum(record.numel for record in linears),
        **({} if job.source.chosen is None else {"blocks": job.source.chosen.as_data()}),
        **neurons_as_data(job.ledger.commits),
    }


def evaluate_job(job: Job, when: str) -> None:
    """Record the perplexity of the source (`before`) or of the output (`after`), where asked and not known yet."""
    wanted, name = job.config.evaluate, f"perplexity.{when}"
    if wanted is None:
        return
    source_directory = job.source.checkpoint.directory
    windows_WL = load_windows(wanted, source_directory)
    text: JsonValue = {"text": describe(wanted.source), "windows": list(windows_WL.shape), "take": wanted.take}
    known = job.ledger.notes.get(name)
    if isinstance(known, dict) and known["on"] == text:
        return
    directory = source_directory if when == "before" else job.model_directory
    with closing(Checkpoint.open(directory)) as checkpoint:
        skeleton = Skeleton(checkpoint, job.skeleton.device, job.skeleton.dtype)
        task, batch = f"evaluate {when}", job.config.compute.batch
        with job.memory.meter.phase("evaluate"):
            perplexity = evaluate(skeleton, windows_WL, batch, job.progress, task, job.stop_if_asked, job.memory)
    empty_cache(job.skeleton.device)  # workers may be about to use it
    job.ledger.record(name, {"perplexity": perplexity, "on": text})
    job.progress.say(f"perplexity {when}: {perplexity:.2f}")
