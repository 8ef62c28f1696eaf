"""Whole runs in numbers: the one that is planned, and those that try splits between blocks and neurons for it."""

from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.paging.spool import spool_directory
from pipeline.planning.choosing import planned_shape
from pipeline.planning.fitting import Room, refusal
from pipeline.planning.footprint import Choice, footprint
from pipeline.planning.held import Phase
from pipeline.planning.methods_work import count_recipe
from pipeline.planning.pace import Cost, Speeds, costs
from pipeline.planning.scale import Scale, generation_of, scale_of
from pipeline.planning.work import count_again, count_collect, count_propagate
from pipeline.shape_record import num_kept
from pipeline.skeleton import Skeleton
from pipeline.splits import Trials

PHASE = "trials"


def planned_scale(config: RunConfig, dense: Skeleton) -> tuple[Skeleton, Scale]:
    """Return a model as small as a run will make it, and the run in numbers; raises ConfigError as `planned_shape`."""
    skeleton, choosing = planned_shape(config, dense)
    scale = scale_of(config, skeleton)
    gone, generation = dense.num_blocks - skeleton.num_blocks, generation_of(config, dense)
    return skeleton, replace(scale, choosing=choosing, num_dropped=gone, generation=generation)


def outside_bytes(skeleton: Skeleton, scale: Scale) -> int:
    """Return the size of the weights outside the blocks, as they are stored."""
    inside = sum(skeleton.block_numel(index) for index in range(skeleton.num_blocks))
    return max(0, skeleton.checkpoint.total_bytes() - inside * scale.stored.itemsize)


def forward_passes(scale: Scale) -> float:
    """Return the passes of all tokens through the model; those that end within a block count by their part of it."""
    work, recipe = scale.work, scale.recipe
    counts = [count_collect(work, recipe), count_propagate(work.cut), count_again(work, recipe)]
    counts += [pruning.whole for pruning in count_recipe(work, recipe)]
    chosen_by = scale.choosing.blocks / work.num_blocks if scale.choosing else 0.0
    run = sum(count.gemm for count in counts) if scale.works else 0.0  # blocks that stay whole are copied
    return run / work.forward_flops + chosen_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Trying:
    """What all trials of a run take."""

    num_runs: int
    cost: Cost
    """Of all of them, from the first survey to the last evaluation."""

    largest: Phase
    """That which holds most, of all their phases."""

    forward_passes: float
    """Of all the calibration sequences of the run that they are for."""

    refused: tuple[str, ...]
    """Why one of them cannot be; empty where all can."""


def trying(config: RunConfig, dense: Skeleton, choice: Choice, room: Room, speeds: Speeds | None) -> Trying | None:
    """Work out what trying splits takes; None where none are to be tried, or all have been. Raises ConfigError."""
    trials = None if num_kept(config.output) is not None else Trials.of(config, dense)
    if trials is None:
        return None
    spent: list[Cost] = []
    phases: list[Phase] = []
    refused: tuple[str, ...] = ()
    passes = 0.0
    directory = spool_directory(config.memory.spool, config.output)
    for num_dropped in trials.splits:
        trial = trials.run_of(num_dropped, directory)
        skeleton, scale = planned_scale(trial, dense)
        spent += costs(scale, choice, speeds, outside_bytes(skeleton, scale))
        phases += footprint(scale, choice, room.baseline)
        refused = refused or refusal(scale, room, config.memory.activations, trial.prune.target)
        part = trial.calibration.sequences / config.calibration.sequences * skeleton.num_blocks / dense.num_blocks
        passes += part * forward_passes(scale)
    return Trying(
        num_runs=len(trials.splits),
        cost=_together(spent),
        largest=replace(max(phases, key=lambda phase: sum(held.num_bytes for held in phase.held)), name=PHASE),
        forward_passes=passes,
        refused=refused,
    )


def _together(spent: list[Cost]) -> Cost:
    """Return what all take one after the other; what the longest waits for stands for all."""
    longest = max(spent, key=lambda cost: cost.seconds or 0.0)
    timed = [cost.seconds for cost in spent if cost.seconds is not None]
    return Cost(
        name=PHASE,
        flops=sum(cost.flops for cost in spent),
        disk_read=sum(cost.disk_read for cost in spent),
        disk_written=sum(cost.disk_written for cost in spent),
        copied=sum(cost.copied for cost in spent),
        seconds=sum(timed) if timed else None,
        bottleneck=longest.bottleneck,
    )
