"""How many attention heads the blocks of a model keep, and what goes with the others: from headers and settings."""

from fractions import Fraction

from pipeline.attention import MAKERS, HeadLayout, attention_of, layout_of
from pipeline.head_config import require_loadable
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.skeleton import Skeleton


def heads_left(step: ShapeStep, dense: Skeleton) -> HeadLayout | None:
    """Return the heads that every attention is to keep; None where all stay.

    Raises ConfigError for families whose heads are not known, where the part that goes is no whole head, and where
    stock transformers would not load what is left.
    """
    if not isinstance(step, Narrowing) or not step.heads:
        return None
    layout = attention_of(dense.model.config).layout
    left = layout.without(layout.num_pruned(Fraction(repr(step.heads)), step.head_unit), step.head_unit)
    require_loadable(dense.model.config, dense.checkpoint.settings(), left, step.head_unit)
    return left


def heads_numel(skeleton: Skeleton, left: HeadLayout | None, num_dimensions: int | None = None) -> int:
    """Return how many parameters of a block go where these heads are left (None: all); of matrices alone with 2."""
    if left is None:
        return 0
    attention, tensors = attention_of(skeleton.model.config), skeleton.checkpoint.tensors
    shapes = {own: tensors[stored].shape for own, stored in skeleton.block_names(0).items()}
    wanted = (1, 2) if num_dimensions is None else (num_dimensions,)
    return sum(attention.num_gone(own, shape, left) for own, shape in shapes.items() if len(shape) in wanted)


def heads_of(skeleton: Skeleton) -> HeadLayout | None:
    """Return the heads that the config.json of an output gives every block; None where all stay."""
    if skeleton.model.config.model_type not in MAKERS:
        return None
    settings, dense = skeleton.checkpoint.settings(), layout_of(skeleton.model.config)
    num_heads, num_groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if not isinstance(num_heads, int) or num_heads >= dense.num_heads:
        return None
    assert isinstance(num_groups, int), "they are written together"
    return HeadLayout(num_heads=num_heads, num_groups=num_groups, head_dim=dense.head_dim)
