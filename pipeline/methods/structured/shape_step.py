"""Steps that make the model itself smaller: which blocks go is chosen once, before the first block is pruned.

    shortgpt   blocks that turn the hidden states least (block influence), found by one survey
    sleb       blocks without which the model's loss on the calibration tokens rises least, one after the other

They come first in a recipe. Steps after them mask weights of the blocks that are left.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.human import human_part
from pipeline.methods.step import Shapes, Step
from pipeline.methods.structured.depth import num_to_drop
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import Statistic

Depth = Literal["one_shot", "rescored", "greedy"]
"""How blocks are chosen: by one survey, by one after every block that goes, or by the model's loss."""


class ShapeStep(Step):
    """Removes whole blocks."""

    method: ClassVar[str]
    """Its name in a recipe."""

    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of the blocks' parameters that goes; None where the step is alone: then it is prune.sparsity."""

    depth: Depth
    """How the blocks that go are chosen."""

    @property
    def widths_differ(self) -> bool:
        """Whether blocks get widths of their own, by their importance."""
        return False

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """None: it looks at hidden states alone."""
        return ()

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Return 0: blocks that stay are what they were."""
        return 0

    def refusal(self, sparsity: Sparsity) -> str | None:
        """Refuse patterns: whole blocks have none."""
        if isinstance(sparsity, SemiStructured):
            return (
                f"{self.method} removes whole blocks, which have no pattern such as {sparsity}; give a fraction, or "
                "put a step that masks weights after it"
            )
        return None

    def num_dropped(self, num_blocks: int, ratio: Fraction) -> int:
        """Return how many blocks make up this part of all blocks' parameters, rounded down.

        Raises ConfigError where that is none, or more than may go: the first block and the last stay.
        """
        wanted, most = int(ratio * num_blocks), max(0, num_blocks - 2)
        if not 0 < wanted <= most:
            rule = f"blocks go whole, and the first and the last stay: {most} of {num_blocks} may go"
            way_out = f"; ask for {human_part(1, num_blocks)} to {human_part(most, num_blocks)}" if most else ""
            raise ConfigError(
                f"{self.method} is to remove {float(ratio):.2%} of {num_blocks} blocks, which is {wanted} of them; "
                f"{rule}{way_out}, or mask weights instead (wanda, besa, …)"
            )
        return num_to_drop(num_blocks, ratio, Fraction(1))

    def nums_dropped(self, num_blocks: int, ratio: Fraction) -> list[int]:
        """Return the numbers of blocks that may make it up, ascending; more than one where they are to be tried."""
        return [self.num_dropped(num_blocks, ratio)]


class ShortGpt(ShapeStep):
    """Removes the blocks of least influence: Men et al. (2403.03853)."""

    method = "shortgpt"

    depth: Depth = "one_shot"
    """`one_shot`: by one survey of the dense model; `rescored`: surveyed anew without those that are gone; `greedy`:
    by the model's loss, as sleb."""


class Sleb(ShapeStep):
    """Removes the blocks that the model's loss misses least: Song et al. (2402.09025)."""

    method = "sleb"

    depth: Depth = "greedy"
    """`greedy`: by the loss without each of the others, half a pass over the model each; else as shortgpt."""
