"""How many neurons blocks have: one number for all, or one for each, as config.json tells it.

Transformers' configurations can say block by block what differs (`per_layer_config`), but its models do not build such
blocks: they refuse the configuration, or, told to ignore that, find tensors of other shapes. So the numbers are taken
out of the configuration before a model is built, and its blocks are then rebuilt one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue
from transformers import PretrainedConfig

from pipeline.anatomy import WIDTH_KEY
from pipeline.errors import UnsupportedCheckpoint

Width = int | tuple[int, ...]
"""Neurons of every block, or of each."""

BY_BLOCK_KEY = "per_layer_config"
"""What config.json calls the settings of single blocks."""


def width_at(width: Width, block: int) -> int:
    """Return the neurons of one block."""
    return width if isinstance(width, int) else width[block]


def each_width(width: Width, num_blocks: int) -> tuple[int, ...]:
    """Return the neurons of each of so many blocks."""
    return (width,) * num_blocks if isinstance(width, int) else width


def level(widths: Sequence[int]) -> Width:
    """Return one number where all are equal, else one for each: what is even is stored as any other model."""
    return widths[0] if len(set(widths)) == 1 else tuple(widths)


def width_in_words(width: Any) -> str:
    """Return `23`, or `20 to 27` of blocks that differ; also of a width that has been read back as plain data."""
    return f"{min(width):,} to {max(width):,}" if isinstance(width, list | tuple) else f"{width:,}"


def settings_by_block(widths: Sequence[int]) -> dict[str, JsonValue]:
    """Return what config.json says of blocks that differ."""
    return {str(block): {WIDTH_KEY: width} for block, width in enumerate(widths)}


def widths_written(settings: Mapping[str, JsonValue]) -> tuple[int, ...] | None:
    """Return the widths that `settings_by_block` has put into a config.json; None where there are none."""
    by_block: Any = settings.get(BY_BLOCK_KEY)
    return None if by_block is None else tuple(own[WIDTH_KEY] for own in by_block.values())


def take_widths(config: PretrainedConfig) -> tuple[int, ...] | None:
    """Take the neurons of each block out of a configuration, which then is one of blocks alike; None where they are.

    Raises UnsupportedCheckpoint where it says anything else of single blocks.
    """
    if not config.is_heterogeneous:
        return None
    blocks = list(config.per_layer_config)
    others = set(config.per_layer_attributes) - {WIDTH_KEY}
    others |= {"skip"} if any(block.skip for block in blocks) else set()
    if others:
        raise UnsupportedCheckpoint(
            f"config.json gives single blocks {', '.join(sorted(others))} of their own ({BY_BLOCK_KEY}); only "
            f"{WIDTH_KEY} may differ between blocks so far. Choose a model whose blocks are alike"
        )
    widths = tuple(getattr(block, WIDTH_KEY) for block in blocks) if config.per_layer_attributes else None
    config.per_layer_config = None
    return widths
