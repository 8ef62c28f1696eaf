"""The shape of a smaller model: which blocks of the dense one it keeps, how wide, and what its config.json then says.

What a config says for each block (its kind of attention, …) is sliced with the blocks. Old configs imply such lists by
a rule over all blocks, which a smaller model would apply anew: they are written out, as the dense model has them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import JsonValue, TypeAdapter
from transformers import PretrainedConfig

from pipeline.anatomy import BIAS_KEY, WIDTH_KEY
from pipeline.attention import HeadLayout
from pipeline.block_widths import BY_BLOCK_KEY, Width, settings_by_block
from pipeline.errors import UnsupportedCheckpoint
from pipeline.head_config import head_settings

BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Settings with one entry a block."""

_NUM_BLOCKS = "num_hidden_layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is left of a dense model."""

    kept: tuple[int, ...]
    """Blocks that stay, by their numbers in the dense model, ascending."""

    width: Width | None = None
    """Neurons of every FFN, or of each block that stays, or None where they are those of the dense model."""

    mlp_bias: bool = False
    """Whether the linears of every FFN have biases that they have not in the dense model."""

    heads: HeadLayout | None = None
    """Of every attention, or None where they are those of the dense model."""

    silent: tuple[int, ...] = ()
    """Blocks that stay, by their numbers in the dense model, whose attention is silenced."""

    @classmethod
    def from_data(cls, data: JsonValue) -> "Shape":
        """Read what `as_data` has written."""
        return TypeAdapter(cls).validate_python(data)

    def dropped(self, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks of a dense model of so many that are gone."""
        return tuple(sorted(set(range(num_blocks)) - set(self.kept)))

    def as_data(self) -> dict[str, JsonValue]:
        """Return plain data."""
        width: JsonValue = list(self.width) if isinstance(self.width, tuple) else self.width
        biases: dict[str, JsonValue] = {"mlp_bias": True} if self.mlp_bias else {}
        heads: dict[str, JsonValue] = {} if self.heads is None else {"heads": asdict(self.heads)}
        silent: dict[str, JsonValue] = {"silent": list(self.silent)} if self.silent else {}
        return {"kept": list(self.kept), "width": width, **biases, **heads, **silent}


def without_last(num_blocks: int, num_dropped: int) -> Shape:
    """Return a shape without the last blocks but one: as large as any other with so many blocks."""
    last = num_blocks - 1
    return Shape(kept=(*range(last - num_dropped), last))


def edited_settings(config: PretrainedConfig, written: Mapping[str, JsonValue], shape: Shape) -> dict[str, JsonValue]:
    """Return what config.json says of a model of this shape: as `written`, but for what the shape changes.

    config: the dense model's, as loaded. Raises UnsupportedCheckpoint where it has a list by block of another length,
    ConfigError where stock transformers would not load so many heads.
    """
    known = config.to_dict()
    name = config.attribute_map.get(_NUM_BLOCKS, _NUM_BLOCKS)
    settings = {key: value for key, value in written.items() if key != _NUM_BLOCKS} | {name: len(shape.kept)}
    if isinstance(shape.width, tuple):
        settings[BY_BLOCK_KEY] = settings_by_block(shape.width)
    elif shape.width is not None:
        settings[WIDTH_KEY] = shape.width
    if shape.mlp_bias:
        settings[BIAS_KEY] = True
    for listed in BY_BLOCK:
        entries = known.get(listed)
        if not entries:
            continue
        if len(entries) != known[name]:
            raise UnsupportedCheckpoint(
                f"config.json has {len(entries)} {listed} for {known[name]} blocks, so it cannot be known which of "
                "them belong to the blocks that stay: correct the list"
            )
        settings[listed] = [entries[block] for block in shape.kept]
    return settings if shape.heads is None else head_settings(config, settings, shape.heads)
