"""How many neurons the blocks of a model keep, so that with the blocks that go as much goes as is asked."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod

from pipeline.anatomy import MLPS, WIDTH_KEY, mlp_of
from pipeline.block_widths import Width, each_width, level, widths_written
from pipeline.errors import ConfigError
from pipeline.head_count import heads_left, heads_numel, heads_of
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.methods.structured.widths import rounded_width, share_of_neurons, widths_by_importance
from pipeline.silencing import part_silenced
from pipeline.skeleton import Skeleton


def num_neurons(skeleton: Skeleton) -> int:
    """Return how many neurons each block of a model has.

    Raises ConfigError for families that are not known, and where blocks differ.
    """
    mlp_of(skeleton.model.config)
    if skeleton.widths is not None:
        raise ConfigError(
            f"the blocks of this model have {min(skeleton.widths)} to {max(skeleton.widths)} neurons; blocks and "
            "neurons can be removed only where all blocks are alike: start from the dense model, or mask weights "
            "(besa, wanda, …)"
        )
    width: int = skeleton.model.config.to_dict()[WIDTH_KEY]
    return width


def neuron_numel(skeleton: Skeleton) -> int:
    """Return how many parameters go with a neuron. Raises ConfigError for families that are not known."""
    mlp, tensors = mlp_of(skeleton.model.config), skeleton.checkpoint.tensors
    touched = (stored for own, stored in skeleton.block_names(0).items() if mlp.touches(own))
    return sum(prod(tensors[stored].shape) for stored in touched) // num_neurons(skeleton)


def width_left(
    step: ShapeStep, dense: Skeleton, num_dropped: int, ratio: Fraction, importance: Sequence[float] | None = None
) -> Width | None:
    """Return how many neurons every block that stays is to keep; None where whole blocks are all that goes.

    ratio: the part of all blocks' parameters that goes; what heads, and attentions that are silenced, do not give of
    it, neurons do. importance: of the blocks that stay, where each gets a width of its own. As long as it is not known
    all count alike: what goes of all blocks together is the same. Raises ConfigError for families whose neurons or
    heads are not known, and where that part leaves too few neurons, or none to go.
    """
    if not isinstance(step, Narrowing):
        return None
    width = num_neurons(dense)
    share = share_of_neurons(
        ratio - part_silenced(step, dense, ratio), num_blocks=dense.num_blocks, num_dropped=num_dropped,
        block_numel=dense.block_numel(0), neuron_numel=neuron_numel(dense), width=width,
        heads_numel=heads_numel(dense, heads_left(step, dense)),
    )  # fmt: skip
    if not share:
        return None
    if not step.widths_differ:
        return rounded_width(width, share, step.multiple)
    scores = importance or [0.0] * (dense.num_blocks - num_dropped)
    return level(widths_by_importance(width, share, scores, Fraction(repr(step.spread)), step.multiple))


def width_of(skeleton: Skeleton) -> Width | None:
    """Return how many neurons the config.json of an output gives every block; None where all stay."""
    settings = skeleton.checkpoint.settings()
    width = settings.get(WIDTH_KEY)
    if skeleton.widths is not None or not isinstance(width, int) or skeleton.model.config.model_type not in MLPS:
        return None
    return widths_written(settings) or (width if width < num_neurons(skeleton) else None)


def mean_width(skeleton: Skeleton) -> int | None:
    """Return the same, or the mean of it where blocks differ, rounded."""
    width = width_of(skeleton)
    return None if width is None else round(sum(each_width(width, skeleton.num_blocks)) / skeleton.num_blocks)


def bytes_left(skeleton: Skeleton) -> int:
    """Return the size of what is written of a skeleton's checkpoint: of blocks as narrow as its config.json says."""
    return skeleton.checkpoint.total_bytes() - _num_gone(skeleton) * skeleton.checkpoint.matrix_dtype().itemsize


def part_gone(dense: Skeleton, left: Skeleton) -> float:
    """Return the part of all blocks' parameters that goes for good, as it comes out for whole blocks and one width."""
    sizes = [sum(skeleton.block_numel(index) for index in range(skeleton.num_blocks)) for skeleton in (dense, left)]
    return 1 - (sizes[1] - _num_gone(left)) / sizes[0]


def weights_gone(skeleton: Skeleton) -> list[int]:
    """Return how many weights of each block's linears go with its neurons and heads; biases are none."""
    width, tensors = width_of(skeleton), skeleton.checkpoint.tensors
    if width is None:
        return [0] * skeleton.num_blocks
    mlp, dense = mlp_of(skeleton.model.config), num_neurons(skeleton)
    touched = [tensors[stored].shape for own, stored in skeleton.block_names(0).items() if mlp.touches(own)]
    of_neuron = sum(prod(shape) for shape in touched if len(shape) == 2) // dense
    of_heads = heads_numel(skeleton, heads_of(skeleton), num_dimensions=2)
    return [(dense - left) * of_neuron + of_heads for left in each_width(width, skeleton.num_blocks)]


def _num_gone(skeleton: Skeleton) -> int:
    """Parameters that go with the neurons and heads of all blocks."""
    width, heads = width_of(skeleton), heads_numel(skeleton, heads_of(skeleton))
    if width is None:
        return 0  # heads go with neurons alone
    num_left = sum(each_width(width, skeleton.num_blocks))
    neurons = (skeleton.num_blocks * num_neurons(skeleton) - num_left) * neuron_numel(skeleton)
    return neurons + skeleton.num_blocks * heads
