"""Tries how much goes with whole blocks and how much with neurons: a throw-away run each, judged on held-out sequences.

The runs are those of the ordinary path, from the survey to the finished model, in a directory of the run's spool. Each
one's perplexity is durable in shape.json as soon as it is known, and a run that was stopped half way goes on.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save

from pipeline.config import RunConfig
from pipeline.devices import empty_cache
from pipeline.durable import write_atomically
from pipeline.errors import RunStopped
from pipeline.paging.spool import remove_leftovers, spool_directory
from pipeline.progress import Progress, StopAsked
from pipeline.report import Report, told_of_trials
from pipeline.shape_record import Figures, ShapeRecord
from pipeline.splits import FITTED, HELD_OUT, Trials

Prune = Callable[[RunConfig, Progress, StopAsked], Report]
"""Carries out a run."""

DIRECTORY = "trials.tmp"
"""Of the trials, within the run's spool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What trials have found."""

    perplexity: dict[int, float]
    """On the sequences held out, by how many blocks went."""

    dense: float
    """That of the dense model there."""

    num_sequences: int
    """That were held out."""

    @property
    def best(self) -> int:
        """The split of the least perplexity; of equal ones that which drops the fewest blocks."""
        return min(self.perplexity, key=lambda num_dropped: (self.perplexity[num_dropped], num_dropped))

    def as_data(self) -> dict[str, JsonValue]:
        """Return plain data."""
        found: JsonValue = {str(num_dropped): value for num_dropped, value in self.perplexity.items()}
        return {"perplexity": found, "dense": self.dense, "sequences": self.num_sequences}


def try_splits(
    trials: Trials,
    tokens_NT: torch.Tensor,
    record: ShapeRecord,
    progress: Progress,
    stop_asked: StopAsked,
    prune: Prune,
) -> Tried:
    """Run every trial whose figure is not known; nothing is left of them but these. Raises RunStopped."""
    config, num_fitted = trials.config, len(tokens_NT) - trials.num_held_out
    spool = spool_directory(config.memory.spool, config.output)
    directory = spool / DIRECTORY
    if not record.begun():
        remove_leftovers(spool)  # of a run with other settings, for all that is known
    figures: dict[int, Figures] = {}
    for number, num_dropped in enumerate(trials.splits, start=1):

        def tried(num_dropped: int = num_dropped, number: int = number) -> Figures:
            progress.say(
                f"trial {number} of {len(trials.splits)}: {num_dropped} of {trials.dense.num_blocks} blocks go"
            )
            _keep(tokens_NT[:num_fitted], directory / FITTED)
            _keep(tokens_NT[num_fitted:], directory / HELD_OUT)
            return _carried_out(trials.run_of(num_dropped, directory), config, progress, stop_asked, prune)

        figures[num_dropped] = record.measure(f"{num_dropped} blocks go", tried)
        shutil.rmtree(directory / str(num_dropped), ignore_errors=True)
        empty_cache(trials.dense.device)
    remove_leftovers(spool)
    found = Tried(
        perplexity={num_dropped: after for num_dropped, (after, _) in figures.items()},
        dense=next(iter(figures.values()))[1], num_sequences=trials.num_held_out,
    )  # fmt: skip
    progress.say(told_of_trials(found.as_data(), found.best))
    return found


def _carried_out(
    trial: RunConfig, config: RunConfig, progress: Progress, stop_asked: StopAsked, prune: Prune
) -> Figures:
    """Return the perplexity of a trial's outcome, and of the dense model, on the sequences held out."""
    try:
        report = prune(trial, progress, stop_asked)
    except RunStopped:
        raise RunStopped(
            "stopped as asked while splits between blocks and neurons were tried; what was found is kept. Go on with: "
            f"secateur run {config.output}"
        ) from None
    assert report.perplexity_after is not None, "a trial is evaluated"
    assert report.perplexity_before is not None, "so is the dense model"
    return [report.perplexity_after, report.perplexity_before]


def _keep(tokens_NT: torch.Tensor, path: Path) -> None:
    """Write tokens where a run reads them."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"tokens": tokens_NT.contiguous()}))
