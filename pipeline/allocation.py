"""How much sparsity each block gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.sparsity import Sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The sparsity of every block: the one that is asked of the model, but where a block has one of its own."""

    target: Sparsity
    own: Mapping[int, Sparsity] = field(default_factory=dict)
    """By the block's number."""

    def of(self, index: int) -> Sparsity:
        """Return the sparsity of a block."""
        return self.own.get(index, self.target)
