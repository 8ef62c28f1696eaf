"""One process prunes all blocks: set up, go on from the last commit, prune, assemble, evaluate, report."""

import json
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from pydantic import JsonValue

from pipeline.activations import Boundary
from pipeline.assemble import assemble
from pipeline.calibration import CalibrationSet, load_calibration, require_positions
from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig, resolved
from pipeline.devices import choose_device, choose_dtype
from pipeline.errors import RunStopped
from pipeline.evaluate import evaluate, load_windows
from pipeline.hub import fetch_model
from pipeline.ledger import Header, Ledger, RunLock, refuse_foreign
from pipeline.meter import human_seconds
from pipeline.progress import Progress, StopAsked
from pipeline.report import REPORT, Report, build_report
from pipeline.shards import remove_leftovers, write_atomically
from pipeline.skeleton import Skeleton
from pipeline.sources import describe
from pipeline.sparsity import SemiStructured
from pipeline.stage import Order, Stage, Streams
from pipeline.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a run holds open."""

    config: RunConfig
    checkpoint: Checkpoint
    skeleton: Skeleton
    calibration: CalibrationSet
    ledger: Ledger
    model_directory: Path
    progress: Progress
    stop_asked: StopAsked

    def stop_if_asked(self) -> None:
        """Raise RunStopped, between blocks, when a stop was asked for."""
        if self.stop_asked():
            raise RunStopped(
                f"stopped as asked: {len(self.ledger.commits)} of {self.skeleton.num_blocks} blocks are committed in "
                f"{self.config.output}. Go on with: secateur run {self.config.output}"
            )


def run(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> Report:
    """Prune a model as configured, or go on where an earlier run of the same configuration ended.

    Raises RunStopped once `stop_asked()` is true and the block at hand is committed; every SecateurError leaves the
    run directory so that the run can be started again.
    """
    refuse_foreign(config.output)
    with RunLock(config.output), open_job(config, progress, stop_asked) as job:
        _evaluate(job, "before")
        prune_blocks(job)
        assemble(job.skeleton, job.ledger, job.model_directory, provenance(job))
        _evaluate(job, "after")
        report = build_report(job.ledger, job.skeleton.num_blocks, job.skeleton.device)
        directory = config.output / "report"
        directory.mkdir(exist_ok=True)
        write_atomically(directory / REPORT, json.dumps(report.as_json(), indent=2).encode() + b"\n")
        return report


@contextmanager
def open_job(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> Iterator[Job]:
    """Open the source, load the calibration tokens, and open or begin the ledger."""
    directory = model_directory_of(config)
    with closing(Checkpoint.open(directory)) as checkpoint:
        device = choose_device(config.compute.device)
        stored = checkpoint.matrix_dtype()
        skeleton = Skeleton(checkpoint, device, choose_dtype(config.compute.dtype, device, stored))
        require_positions(config.calibration.tokens, skeleton.num_positions, "calibration.tokens")
        calibration = load_calibration(config.calibration, directory, skeleton.vocab_size)
        ledger = Ledger.open(config.output, header_of(config, skeleton, calibration))
        write_atomically(config.output / "config.yaml", yaml.safe_dump(resolved(config), sort_keys=False).encode())
        model_directory = config.output / "model"
        model_directory.mkdir(exist_ok=True)
        for written_to in (config.output, model_directory, config.output / "report"):
            remove_leftovers(written_to)
        yield Job(
            config=config,
            checkpoint=checkpoint,
            skeleton=skeleton,
            calibration=calibration,
            ledger=ledger,
            model_directory=model_directory,
            progress=progress,
            stop_asked=stop_asked,
        )


def model_directory_of(config: RunConfig) -> Path:
    """Return the directory of the model to prune, fetching it from the hub if asked."""
    if config.model.path is not None:
        return config.model.path
    assert config.model.hub is not None
    return fetch_model(config.model.hub, config.model.revision)


def header_of(config: RunConfig, skeleton: Skeleton, calibration: CalibrationSet) -> Header:
    """Return what determines the output's bytes: a resumed run must agree with it."""
    target = config.prune.target
    prune: dict[str, JsonValue] = {
        "sparsity": str(target) if isinstance(target, SemiStructured) else target.ratio,
        "recipe": config.prune.steps.as_data(),
        "skip": list(config.prune.skip),
    }
    compute: dict[str, JsonValue] = {
        "device": skeleton.device.type,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "batch": config.compute.batch,
    }
    return Header(
        config={"prune": prune, "compute": compute},
        source=skeleton.checkpoint.fingerprint(),
        calibration=calibration.sha256,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("secateur", "torch", "transformers")},
        },
    )


def prune_blocks(job: Job) -> None:
    """Prune every block the ledger does not hold yet."""
    remaining = job.ledger.remaining(job.skeleton.num_blocks)
    if not remaining:
        return
    recipe = job.config.prune.steps
    first = embed_calibration(job)
    dense = Boundary.copy_of(first) if recipe.needs_dense_stream else None
    order = Order(
        recipe=recipe,
        sparsity=job.config.prune.target,
        skip=job.config.prune.skip,
        batch=job.config.compute.batch,
    )
    stage = Stage(job.skeleton, order, Streams(pruned=first, dense=dense), job.model_directory, job.progress)
    replay_committed(job, stage, remaining.start)
    job.progress.say(f"calibration: {job.calibration.description}")
    job.progress.begin("prune", job.skeleton.num_blocks, remaining.start)
    for index in remaining:
        commit, watch = stage.prune_block(index)
        job.ledger.commit(commit)
        job.stop_if_asked()
        stage.propagate(index, watch)
        job.ledger.record(f"propagate.{index}", watch.seconds["propagate"])
        job.progress.advance(index, f"error {commit.error:.4f}, {human_seconds(sum(watch.seconds.values()))}")
    job.progress.end()


def replay_committed(job: Job, stage: Stage, num_committed: int) -> None:
    """Rebuild the hidden states at the first block to do, from the blocks already committed."""
    if num_committed == 0:
        return
    job.progress.say(f"{num_committed} of {job.skeleton.num_blocks} blocks are committed; going on from there")
    job.progress.begin("replay", num_committed, 0)
    for index in range(num_committed):
        stage.replay(index, job.ledger.commits[index])
        job.stop_if_asked()
        job.progress.advance(index, "")
    job.progress.end()


def embed_calibration(job: Job) -> Boundary:
    """Return boundary 0: the calibration sequences as they enter the first block."""
    stream = Stream(job.skeleton, job.checkpoint)
    tokens_NT = job.calibration.tokens_NT
    boundary = Boundary((len(tokens_NT), tokens_NT.shape[1], stream.num_features), job.skeleton.dtype)
    with torch.no_grad(), stream.outside_weights():
        for sequences in boundary.batches(job.config.compute.batch):
            boundary.write(sequences, stream.embed(tokens_NT[sequences]), "the embedding")
    return boundary


def provenance(job: Job) -> dict[str, JsonValue]:
    """Return what the model directory says about how it was made; it names no path, for it may be published."""
    commits = job.ledger.commits.values()
    linears = [record for commit in commits for record in commit.linears.values()]
    return {
        "tool": f"secateur {version('secateur')}",
        "settings": job.ledger.header.config,
        "calibration": {"shape": list(job.calibration.tokens_NT.shape), "sha256": job.calibration.sha256},
        "source_sha256": job.ledger.header.source,
        "pruned_weights": sum(record.pruned for record in linears),
        "prunable_weights": sum(record.numel for record in linears),
    }


def _evaluate(job: Job, when: str) -> None:
    """Record the perplexity of the source (`before`) or of the output (`after`), where asked and not known yet."""
    wanted, name = job.config.evaluate, f"perplexity.{when}"
    if wanted is None:
        return
    windows_WL = load_windows(wanted, job.checkpoint.directory)
    text: JsonValue = {
        "text": describe(wanted.source),
        "windows": list(windows_WL.shape),
        "take": wanted.take,
    }
    known = job.ledger.notes.get(name)
    if isinstance(known, dict) and known["on"] == text:
        return
    directory = job.checkpoint.directory if when == "before" else job.model_directory
    with closing(Checkpoint.open(directory)) as checkpoint:
        skeleton = Skeleton(checkpoint, job.skeleton.device, job.skeleton.dtype)
        task = f"evaluate {when}"
        perplexity = evaluate(skeleton, windows_WL, job.config.compute.batch, job.progress, task, job.stop_if_asked)
    job.ledger.record(name, {"perplexity": perplexity, "on": text})
    job.progress.say(f"perplexity {when}: {perplexity:.2f}")
