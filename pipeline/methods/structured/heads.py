"""Attention heads that may go, where several query heads share one head of keys and values.

A head reads from rows of q, k and v, and writes through columns of o. Rotary embeddings pair the features of a head,
and a configuration has one `head_dim`, so a head goes whole or stays. With H query heads over G groups (heads of keys
and values), query head h belongs to group h // (H / G). Two cuts leave groups of one size, as every loader needs:

    group   whole groups go, each with its keys, values and all its query heads
    query   every group loses the same number of query heads; keys and values stay

Either way the unit's part of the output is its columns of o, so units are chosen, and rescaled, as neurons are.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.selection import Rounds, Selection, select

HeadUnit = Literal["group", "query"]
"""What goes as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """The heads of an attention."""

    num_heads: int
    """Query heads."""

    num_groups: int
    """Heads of keys and values."""

    head_dim: int

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_groups == 0, f"{self.num_heads} heads in {self.num_groups} equal groups"

    @property
    def heads_per_group(self) -> int:
        """Query heads that share keys and values."""
        return self.num_heads // self.num_groups

    def problem(self, weight_OD: torch.Tensor, gram_DD: torch.Tensor, unit: HeadUnit) -> MaskProblem:
        """Return the mask problem of `o_proj`, whose inputs are the query heads' outputs side by side."""
        size = self.head_dim * (self.heads_per_group if unit == "group" else 1)
        return MaskProblem(weight_OD=weight_OD, gram_DD=gram_DD, unit_size=size)

    def kept(self, keep_U: torch.Tensor, unit: HeadUnit) -> "KeptHeads":
        """Return the heads that stay where these units do."""
        if unit == "group":
            return KeptHeads(keep_H=keep_U.repeat_interleave(self.heads_per_group), keep_G=keep_U, layout=self)
        return KeptHeads(keep_H=keep_U, keep_G=keep_U.new_ones(self.num_groups), layout=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptHeads:
    """The heads that stay, and which features those are."""

    keep_H: torch.Tensor
    """bool, by query head."""

    keep_G: torch.Tensor
    """bool, by head of keys and values."""

    layout: HeadLayout
    """Of the dense attention."""

    @property
    def query_features(self) -> torch.Tensor:
        """Rows of q, and columns of o, that stay: bool."""
        return self.keep_H.repeat_interleave(self.layout.head_dim)

    @property
    def key_features(self) -> torch.Tensor:
        """Rows of k and of v that stay: bool."""
        return self.keep_G.repeat_interleave(self.layout.head_dim)

    @property
    def remaining(self) -> HeadLayout:
        """The attention that is left; kept query heads still belong to their own keys and values."""
        num_heads, num_groups = int(self.keep_H.count_nonzero()), int(self.keep_G.count_nonzero())
        return HeadLayout(num_heads=num_heads, num_groups=num_groups, head_dim=self.layout.head_dim)


def select_heads(
    problem: MaskProblem, layout: HeadLayout, num_pruned: int, unit: HeadUnit, how: Rounds
) -> tuple[Selection, KeptHeads]:
    """Choose the heads that go: `num_pruned` groups, or that many query heads of every group.

    At least one unit (of every group) has to stay. Raises NumericsError where the problem cannot be factorised.
    """
    selection = select(problem, num_pruned, how, 1 if unit == "group" else layout.num_groups)
    return selection, layout.kept(selection.keep_U, unit)
