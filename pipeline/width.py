"""How many neurons the blocks of a model keep, so that with the blocks that go as much goes as is asked."""

from fractions import Fraction
from math import prod

from pipeline.anatomy import MLPS, WIDTH_KEY, mlp_of
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.methods.structured.widths import rounded_width, share_of_neurons
from pipeline.skeleton import Skeleton


def num_neurons(skeleton: Skeleton) -> int:
    """Return how many neurons each block of a model has. Raises ConfigError for families that are not known."""
    mlp_of(skeleton.model.config)
    width: int = skeleton.model.config.to_dict()[WIDTH_KEY]
    return width


def neuron_numel(skeleton: Skeleton) -> int:
    """Return how many parameters go with a neuron. Raises ConfigError for families that are not known."""
    mlp, tensors = mlp_of(skeleton.model.config), skeleton.checkpoint.tensors
    touched = (stored for own, stored in skeleton.block_names(0).items() if mlp.touches(own))
    return sum(prod(tensors[stored].shape) for stored in touched) // num_neurons(skeleton)


def width_left(step: ShapeStep, dense: Skeleton, num_dropped: int, ratio: Fraction) -> int | None:
    """Return how many neurons every block that stays is to keep; None where whole blocks are all that goes.

    ratio: the part of all blocks' parameters that goes. Raises ConfigError for families whose neurons are not known,
    and where that part leaves too few of them.
    """
    if not isinstance(step, Narrowing):
        return None
    width = num_neurons(dense)
    share = share_of_neurons(
        ratio, num_blocks=dense.num_blocks, num_dropped=num_dropped, block_numel=dense.block_numel(0),
        neuron_numel=neuron_numel(dense), width=width,
    )  # fmt: skip
    return rounded_width(width, share, step.multiple) if share else None


def width_of(skeleton: Skeleton) -> int | None:
    """Return how many neurons the config.json of an output gives every block; None where all stay."""
    width = skeleton.checkpoint.settings().get(WIDTH_KEY)
    if not isinstance(width, int) or skeleton.model.config.model_type not in MLPS:
        return None
    return width if width < num_neurons(skeleton) else None


def bytes_left(skeleton: Skeleton) -> int:
    """Return the size of what is written of a skeleton's checkpoint: of blocks as narrow as its config.json says."""
    return skeleton.checkpoint.total_bytes() - _num_gone(skeleton) * skeleton.checkpoint.matrix_dtype().itemsize


def part_gone(dense: Skeleton, left: Skeleton) -> float:
    """Return the part of all blocks' parameters that goes for good, as it comes out for whole blocks and one width."""
    sizes = [sum(skeleton.block_numel(index) for index in range(skeleton.num_blocks)) for skeleton in (dense, left)]
    return 1 - (sizes[1] - _num_gone(left)) / sizes[0]


def _num_gone(skeleton: Skeleton) -> int:
    """Parameters that go with the neurons of all blocks."""
    width = width_of(skeleton)
    return 0 if width is None else skeleton.num_blocks * (num_neurons(skeleton) - width) * neuron_numel(skeleton)
