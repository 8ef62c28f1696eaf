"""What is asked for, held against a model's blocks before anything that takes long, and before anything is written."""

from pipeline.allocation import Allocation
from pipeline.block_widths import Width
from pipeline.config import RunConfig
from pipeline.cutting import Cutting
from pipeline.errors import ConfigError
from pipeline.head_count import heads_left
from pipeline.methods.structured.judge import NONE_HELD_OUT
from pipeline.order import Order, check_divides, linears_to_prune
from pipeline.skeleton import Skeleton
from pipeline.splits import splits_of
from pipeline.width import width_left


def require_prunable(config: RunConfig, dense: Skeleton) -> None:
    """Raise ConfigError where a model's blocks cannot be pruned as asked, whatever is found to be left of them."""
    recipe, target = config.prune.steps, config.prune.target
    if recipe.shape is None:
        return _require(config, dense, None)
    ratio = recipe.part_removed(target)
    for num_dropped in splits_of(recipe.shape, dense, ratio):
        _require(config, dense, width_left(recipe.shape, dense, num_dropped, ratio))
    return None


def _require(config: RunConfig, dense: Skeleton, width: Width | None) -> None:
    """Hold it against blocks of a width."""
    recipe, skip, target = config.prune.steps, config.prune.skip, config.prune.target
    narrowing, num_sequences = recipe.narrowing, config.calibration.sequences
    heads = None if recipe.shape is None else heads_left(recipe.shape, dense)
    order = Order(recipe=recipe, allocation=Allocation(target=target), skip=skip, width=width, heads=heads)
    cutting = Cutting.of(dense, order, num_sequences)
    if recipe.steps:
        found_later = cutting is None or isinstance(width, tuple)  # widths by block follow from a survey
        left = {} if found_later or cutting is None else cutting.columns_left
        check_divides(linears_to_prune(dense.blocks[0], skip), dense.blocks[0], target, left)
    if cutting is not None and narrowing is not None and narrowing.needs_targets and num_sequences < 2:
        raise ConfigError(NONE_HELD_OUT)
