"""What choosing a shape takes: how often how much of the model is run over the calibration sequences."""

from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.head_count import heads_left
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.narrower import narrowed
from pipeline.shape import without_last
from pipeline.shape_record import num_kept
from pipeline.silencing import num_silenced, part_silenced
from pipeline.skeleton import Skeleton
from pipeline.splits import splits_of
from pipeline.width import width_left
from pipeline.zeros import adds_biases


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Runs of models to choose a shape by."""

    models: int
    """How many are looked at."""

    embedded: int
    """How often the sequences are embedded: models whose first blocks are the same have those run once."""

    blocks: int
    """Blocks that are run, of all of them."""

    evaluates: bool
    """Whether each is run to the end, for its loss, or surveyed."""

    surveys: bool = False
    """Whether the dense model is surveyed beside, for the widths of its blocks; that is counted above too."""


def choosing_of(step: ShapeStep, num_blocks: int, num_dropped: int) -> Choosing:
    """Return what a step runs of a dense model of so many blocks."""
    if step.depth == "one_shot" or not num_dropped:
        return Choosing(models=1, embedded=1, blocks=num_blocks, evaluates=False)
    left = [num_blocks - gone for gone in range(num_dropped)]
    if step.depth == "rescored":
        return Choosing(models=num_dropped, embedded=num_dropped, blocks=sum(left), evaluates=False)
    # All but the first and the last are candidates: for each all blocks after it are run, and once those before them.
    run = [(blocks - 2) * (blocks - 1) // 2 + blocks - 2 for blocks in left]
    surveys = step.widths_differ
    return Choosing(
        models=sum(blocks - 2 for blocks in left), embedded=num_dropped + surveys,
        blocks=sum(run) + surveys * num_blocks, evaluates=True, surveys=surveys,
    )  # fmt: skip


def choosing_attentions(num_blocks: int, num_silent: int) -> Choosing:
    """Return about what is run to choose that many attentions, for it depends on which are silenced first.

    For each candidate the blocks from it on are run, half of all, and once those before the last one.
    """
    models = sum(num_blocks - gone for gone in range(num_silent))
    blocks = models * (num_blocks + 1) // 2 + num_silent * (num_blocks - 1)
    return Choosing(models=models, embedded=num_silent, blocks=blocks, evaluates=True)


def planned_shape(config: RunConfig, dense: Skeleton) -> tuple[Skeleton, Choosing | None]:
    """Return a model as small as a run will make it, and what choosing its blocks takes; None where it is done.

    Which blocks stay is not known yet, and of no account: they are of one size. Where it is to be found out how many
    go, as few go as may. Raises ConfigError where the ratio is not one of blocks.
    """
    recipe, target = config.prune.steps, config.prune.target
    step = recipe.shape
    if step is None:
        return dense, None
    ratio = recipe.part_removed(target)
    kept, splits = num_kept(config.output), splits_of(step, dense, ratio)
    gone = dense.num_blocks - (kept or 0)
    num_dropped = gone if gone in splits else splits[0]
    width = width_left(step, dense, num_dropped, ratio)
    num_silent, choosing = num_silenced(step, dense, ratio), None
    if kept is None and num_silent:
        choosing = choosing_attentions(dense.num_blocks, num_silent)
    elif kept is None and (num_dropped or (step.widths_differ and width is not None)):
        choosing = choosing_of(step, dense.num_blocks, num_dropped)
    shape = replace(
        without_last(dense.num_blocks, num_dropped), width=width, mlp_bias=adds_biases(step, dense, width),
        heads=heads_left(step, dense), silent=tuple(range(num_silent)),
    )  # fmt: skip
    return narrowed(dense, shape), choosing


def part_idle(config: RunConfig, dense: Skeleton) -> float:
    """Return the part of all blocks' parameters that will be idle, because attentions are silenced."""
    recipe = config.prune.steps
    return (
        0.0
        if recipe.shape is None
        else float(part_silenced(recipe.shape, dense, recipe.part_removed(config.prune.target)))
    )
