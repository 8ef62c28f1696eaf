"""What is asked of every block, and whether a block can be pruned so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.allocation import Allocation
from pipeline.attention import HeadLayout
from pipeline.block_widths import Width
from pipeline.errors import ConfigError
from pipeline.linears import Linear, find_linears
from pipeline.recipe import Recipe
from pipeline.sparsity import SemiStructured, Sparsity, divides


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked of every block."""

    recipe: Recipe
    allocation: Allocation
    skip: tuple[str, ...] = ()
    batch: int = 4
    width: Width | None = None
    """Neurons that are to be left in every block, or in each; None where all stay."""

    heads: HeadLayout | None = None
    """Heads that are to be left in every attention; None where all stay. Neurons go with them."""


def linears_to_prune(block: nn.Module, skip: tuple[str, ...]) -> list[Linear]:
    """Return the linears of a block less the skipped; raises ConfigError when a pattern or a block comes out empty."""
    everything, linears = find_linears(block), find_linears(block, skip)
    names = ", ".join(linear.name for linear in everything)
    for pattern in skip:
        if len(find_linears(block, [pattern])) == len(everything):
            raise ConfigError(f"prune.skip: {pattern!r} matches no linear of a block; they are called {names}")
    if not linears:
        raise ConfigError(f"prune.skip leaves nothing to prune of {names}; skip fewer")
    return linears


def check_divides(
    linears: Sequence[Linear], block: nn.Module, sparsity: Sparsity, left: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Raise ConfigError when an N:M group does not divide a linear's rows.

    left: input features that are left of some linears in one block or another, before they are pruned, by their names.
    """
    for linear in linears:
        for num_columns in (left or {}).get(linear.name, linear.weight(block).shape[1:]):
            if isinstance(sparsity, SemiStructured) and not divides(sparsity, num_columns):
                is_left = linear.name in (left or {})
                way = f"set `multiple: {sparsity.group}`, or other `heads`" if is_left else "add it to prune.skip"
                raise ConfigError(
                    f"{linear.name} has {num_columns} input features, not a multiple of the group of "
                    f"{sparsity.group} in {sparsity}; {way}, or use another pattern or an unstructured sparsity"
                )
