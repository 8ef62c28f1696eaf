"""How a step that makes blocks narrower shares out what goes: between whole blocks and neurons, and among blocks."""

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from pipeline.methods.structured.depth import num_to_drop
from pipeline.methods.structured.shape_step import Depth, ShapeStep

MOST_TRIED = 9
"""Numbers of blocks that `depth_fraction: auto` tries at most."""

DepthFraction = Literal["auto"] | Annotated[float, Field(ge=0, le=1)]

Widths = Literal["uniform", "per_block"]
"""One number of neurons for all blocks, or one for each."""


class SizedStep(ShapeStep):
    """Removes whole blocks and neurons of those that stay, of all alike or of each as many as it can miss."""

    depth: Depth = "one_shot"
    """How the blocks that go are chosen: by one survey of the dense model (`one_shot`), surveyed anew without those
    that are gone (`rescored`), or by the model's loss (`greedy`)."""

    depth_fraction: DepthFraction = 0.0
    """The part of what goes that goes with whole blocks, as far as whole ones fit into it; neurons make up the rest.
    With `auto` it is found out: no block, one, two, … up to all that fit (nine numbers of them at most, evenly spread)
    are each tried by a whole run on the calibration sequences less the part `held_out`, whose outputs are thrown away,
    and the one of the least perplexity on the sequences held out is taken. So it costs that many runs more, and is for
    where the split matters more than the time: which is better differs by model, ratio and text."""

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

    def num_dropped(self, num_blocks: int, ratio: Fraction) -> int:
        """Return how many whole blocks fit into their part of what goes; neurons make up the rest."""
        assert self.depth_fraction != "auto", "it is to be found out"
        return num_to_drop(num_blocks, ratio, Fraction(repr(self.depth_fraction)))

    def nums_dropped(self, num_blocks: int, ratio: Fraction) -> list[int]:
        """Return the one number that is asked for; of `auto` all that fit, MOST_TRIED evenly spread where more do."""
        if self.depth_fraction != "auto":
            return [self.num_dropped(num_blocks, ratio)]
        most = num_to_drop(num_blocks, ratio, Fraction(1))
        steps = min(most, MOST_TRIED - 1)
        return [round(Fraction(most * step, max(1, steps))) for step in range(steps + 1)]
