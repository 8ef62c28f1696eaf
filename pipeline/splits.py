"""How what is to go is split between whole blocks and neurons, where that is to be found out by trying.

A split goes by how many blocks it drops; neurons make up the rest. Each is tried by a run of its own on the calibration
sequences but the last ones, on which its outcome is evaluated.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pipeline.calibration import CalibrationConfig
from pipeline.config import EvaluateConfig, ModelConfig, PruneConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.skeleton import Skeleton
from pipeline.sources import TokensFile
from pipeline.width import width_left

FITTED, HELD_OUT = "fitted.safetensors", "held-out.safetensors"
"""Calibration sequences that trials learn from, and those that they are judged on."""


def splits_of(step: ShapeStep, dense: Skeleton, ratio: Fraction) -> list[int]:
    """Return how many blocks may go, ascending: one number where the step names it, else all that are to be tried.

    ratio: part of all blocks' parameters that goes. Those that leave too few neurons are left out; raises ConfigError
    where that is all of them.
    """
    found, refused = [], None
    for num_dropped in step.nums_dropped(dense.num_blocks, ratio):
        try:
            width_left(step, dense, num_dropped, ratio)
        except ConfigError as error:
            refused = error
        else:
            found.append(num_dropped)
    if refused is not None and not found:
        raise refused
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Runs that try the splits of one run."""

    config: RunConfig
    """Of the run that they are for."""

    dense: Skeleton
    step: Narrowing
    ratio: Fraction
    splits: list[int]

    @classmethod
    def of(cls, config: RunConfig, dense: Skeleton) -> "Trials | None":
        """Return the trials that a run needs; None where there is one way to split alone. Raises ConfigError."""
        recipe = config.prune.steps
        step, ratio = recipe.narrowing, recipe.part_removed(config.prune.target)
        splits = [] if step is None else splits_of(step, dense, ratio)
        if step is None or len(splits) < 2:
            return None
        trials = cls(config=config, dense=dense, step=step, ratio=ratio, splits=splits)
        trials._require_sequences()
        return trials

    @property
    def num_held_out(self) -> int:
        """Calibration sequences that trials are judged on, the last ones: one at least, no more than can be spared."""
        most = self.config.calibration.sequences - self._least_fitted
        return min(max(1, round(self.step.held_out * self.config.calibration.sequences)), most)

    def run_of(self, num_dropped: int, directory: Path) -> RunConfig:
        """Return the run that tries to drop so many blocks; directory: of its tokens, and of its own directory."""
        config, num_tokens = self.config, self.config.calibration.tokens
        part = min(1.0, (num_dropped + 0.5) / float(self.ratio * self.dense.num_blocks))
        options = self.step.model_dump(mode="json") | {"depth_fraction": part, "ratio": None}
        compute = {"device": str(self.dense.device), "dtype": str(self.dense.dtype).removeprefix("torch.")}
        return RunConfig(
            model=ModelConfig(path=self.dense.checkpoint.directory),
            output=directory / str(num_dropped),
            calibration=CalibrationConfig(
                source=TokensFile(tokens=directory / FITTED), tokens=num_tokens,
                sequences=config.calibration.sequences - self.num_held_out,
            ),
            prune=PruneConfig(
                sparsity=self.step.ratio or config.prune.sparsity, recipe=({self.step.method: options},),
                within_block=config.prune.within_block if self.step.heads else "joint",
            ),
            compute=config.compute.model_copy(update=compute),
            memory=config.memory.model_copy(update={"spool": None}),
            evaluate=EvaluateConfig(
                source=TokensFile(tokens=directory / HELD_OUT), sequence_length=num_tokens, windows=self.num_held_out
            ),
        )  # fmt: skip

    @property
    def _least_fitted(self) -> int:
        """Sequences that a trial needs: one, and another to judge a recovery by."""
        return 1 + self.step.needs_targets

    def _require_sequences(self) -> None:
        least = 1 + self._least_fitted
        if self.config.calibration.sequences < least:
            raise ConfigError(
                f"depth_fraction: auto tries {len(self.splits)} splits on calibration sequences, some of which it "
                f"holds out to judge them by, and calibration.sequences is {self.config.calibration.sequences}: set "
                f"it to {least} at least, or depth_fraction to a number"
            )
