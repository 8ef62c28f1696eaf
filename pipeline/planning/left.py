"""What is left of a block's linears once a run has made the block smaller: the shapes that later phases see."""

from collections.abc import Sequence

from pipeline.anatomy import mlp_of
from pipeline.attention import attention_of
from pipeline.head_count import heads_of
from pipeline.linears import Linear
from pipeline.planning.work import Linears, shapes_of
from pipeline.skeleton import Skeleton
from pipeline.width import mean_width


def shapes_left(skeleton: Skeleton, groups: Sequence[Sequence[Linear]]) -> tuple[Linears, ...] | None:
    """Return (out features, in features) of every linear, by group, as blocks will be written; None where all stay.

    groups: of the linears of a block of the skeleton, whose config.json says how wide blocks become: on average, where
    they differ.
    """
    width = mean_width(skeleton)
    if width is None:
        return None
    mlp, heads = mlp_of(skeleton.model.config), heads_of(skeleton)

    def left(name: str, shape: tuple[int, int]) -> tuple[int, int]:
        num_rows, num_columns = shape
        if heads is not None and (attention := attention_of(skeleton.model.config)).touches(f"{name}.weight"):
            return attention.shape_left(name, shape, heads)
        return (
            mlp.num_parts * width if name in mlp.makers else num_rows,
            width if name == mlp.reader else num_columns,
        )

    dense = shapes_of(skeleton.blocks[0], groups)
    return tuple(
        tuple(left(linear.name, shape) for linear, shape in zip(group, shapes, strict=True))
        for group, shapes in zip(groups, dense, strict=True)
    )
