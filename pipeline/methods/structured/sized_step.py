"""How a step that makes blocks narrower shares out what goes: evenly, or by how much each block matters."""

from typing import Literal

from pydantic import Field

from pipeline.methods.structured.shape_step import ShapeStep

Widths = Literal["uniform", "per_block"]
"""One number of neurons for all blocks, or one for each."""


class SizedStep(ShapeStep):
    """Leaves blocks a width, or each a width of its own."""

    widths: Widths = "uniform"
    """`uniform`: all blocks keep as many neurons, so that the model loads anywhere. `per_block`: the more a block turns
    the hidden states, by one survey of the dense model (block influence, 2403.03853), the more it keeps. Stock
    transformers refuses such a model, and `pipeline.uneven.load` loads it: to be tried where that is no matter."""

    spread: float = Field(default=0.3, ge=0, le=1)
    """With `per_block`: how far blocks differ; most lose between `1 - spread` and `1 + spread` times the mean."""

    @property
    def widths_differ(self) -> bool:
        """Where each block is to have a width of its own."""
        return self.widths == "per_block"
