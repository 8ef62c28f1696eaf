"""Whole attentions that are silenced: what writes their output to the hidden states becomes zero (2SSP's second stage).

The block then is what it would be without its attention, in every runtime, and the files are as large as before:
stock loaders build an attention in every block. So these parameters are counted as idle, not as gone.
"""

from fractions import Fraction
from math import prod

from pipeline.errors import ConfigError
from pipeline.methods.structured.baselines import two_ssp_split
from pipeline.methods.structured.published import TwoSsp
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.skeleton import Skeleton

ATTENTION, MLP = "self_attn.", "mlp."
"""What the names of their parameters within a block begin with."""

WRITER = "self_attn.o_proj."
"""What the names of those begin with that write to the hidden states; they do nothing else."""


def num_silenced(step: ShapeStep, dense: Skeleton, ratio: Fraction) -> int:
    """Return how many attentions are to be silenced, as 2SSP splits what is asked for; 0 for most steps.

    ratio: part of all blocks' parameters. The split knows sizes alone: where attentions are large beside the MLPs, they
    can be more than the ratio.

    Raises ConfigError for families whose attention is not known, and where there are too few neurons for the rest.
    """
    if not isinstance(step, TwoSsp):
        return 0
    num_silent, _ = two_ssp_split(
        ratio, num_blocks=dense.num_blocks, mlp_numel=_numel(dense, MLP), attention_numel=attention_numel(dense),
        alpha=step.alpha,
    )  # fmt: skip
    return num_silent


def part_silenced(step: ShapeStep, dense: Skeleton, ratio: Fraction) -> Fraction:
    """Return the part of all blocks' parameters that is idle where that many attentions are silenced."""
    num_silent = num_silenced(step, dense, ratio)
    if num_silent == 0:
        return Fraction(0)
    return Fraction(num_silent * attention_numel(dense), dense.num_blocks * dense.block_numel(0))


def attention_numel(skeleton: Skeleton) -> int:
    """Return how many parameters the attention of a block has. Raises ConfigError where it is not known which."""
    if not writers(skeleton, 0):
        raise ConfigError(
            f"no attention of {skeleton.model.config.model_type} can be silenced so far: its blocks have no "
            f"{WRITER}weight; remove neurons or whole blocks alone (wanda_sp, sleb)"
        )
    return _numel(skeleton, ATTENTION)


def writers(skeleton: Skeleton, block: int) -> list[str]:
    """Return what writes a block's attention to the hidden states: checkpoint names of a weight, and maybe a bias."""
    return [stored for own, stored in skeleton.block_names(block).items() if own.startswith(WRITER)]


def _numel(skeleton: Skeleton, prefix: str) -> int:
    tensors, names = skeleton.checkpoint.tensors, skeleton.block_names(0)
    return sum(prod(tensors[stored].shape) for own, stored in names.items() if own.startswith(prefix))
