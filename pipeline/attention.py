"""Attention heads that may go: where they are in a block, which of them go together, and what is left.

A head reads from rows of q, k and v, and writes through columns of o. Rotary embeddings pair the features of a head,
and a configuration has one `head_dim`, so a head goes whole or stays. With H query heads over G groups (heads of keys
and values), query head h belongs to group h // (H / G). Two cuts leave groups of one size, as every loader needs:

    group   whole groups go, each with its keys, values and all its query heads
    query   every group loses the same number of query heads; keys and values stay

Either way the unit's part of the output is its columns of o, so units are chosen, and rescaled, as neurons are.

Families store heads differently (phi3 has q, k and v in one matrix), so each is named here, and the others are refused:
olmo2 among them, whose norms of queries and keys are taken over all heads together, so that none can go without
changing the rest. Norms over one head (qwen3, gemma3) serve whichever heads are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, prod
from typing import Any, Literal

import torch

from pipeline.errors import ConfigError
from pipeline.human import human_part

HeadUnit = Literal["group", "query"]
"""What goes as one."""

Role = Literal["query", "key"]
"""Whose rows: those of query heads, or of heads of keys and values."""


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

    def __str__(self) -> str:
        return f"{self.num_heads} query heads on {self.num_groups} of keys and values"

    @property
    def settings(self) -> dict[str, int]:
        """What config.json says of them."""
        return {
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_groups, "head_dim": self.head_dim
        }  # fmt: skip

    @property
    def heads_per_group(self) -> int:
        """Query heads that share keys and values."""
        return self.num_heads // self.num_groups

    def rows(self, role: Role) -> int:
        """Return how many rows the heads of a role have."""
        return self.head_dim * (self.num_heads if role == "query" else self.num_groups)

    def unit_size(self, unit: HeadUnit) -> int:
        """Return how many columns of o a unit writes through."""
        return self.head_dim * (self.heads_per_group if unit == "group" else 1)

    def num_pools(self, unit: HeadUnit) -> int:
        """Return into how many runs units are split, each of which loses as many."""
        return 1 if unit == "group" else self.num_groups

    def per_pool(self, unit: HeadUnit) -> int:
        """Return how many units such a run has: groups, or the query heads of one."""
        return self.num_groups if unit == "group" else self.heads_per_group

    def without(self, num_pruned: int, unit: HeadUnit) -> "HeadLayout":
        """Return what is left when so many units of every pool go."""
        num_left = self.per_pool(unit) - num_pruned
        if unit == "group":
            return HeadLayout(num_heads=num_left * self.heads_per_group, num_groups=num_left, head_dim=self.head_dim)
        return HeadLayout(num_heads=num_left * self.num_groups, num_groups=self.num_groups, head_dim=self.head_dim)

    def num_pruned(self, part: Fraction, unit: HeadUnit) -> int:
        """Return how many units of every pool make up this part of them (0 <= part < 1), rounded down: one stays.

        Raises ConfigError where that is none.
        """
        per_pool = self.per_pool(unit)
        wanted = floor(part * per_pool)
        if wanted == 0:
            what = "groups of heads" if unit == "group" else "query heads of a group"
            other = "query" if unit == "group" else "group"
            way_out = f"ask for {human_part(1, per_pool)} at least" if per_pool > 1 else "the last one stays"
            raise ConfigError(
                f"heads: {float(part):g} of {per_pool} {what} is less than one, and heads go whole; {way_out}, or "
                f"choose `head_unit: {other}` ({self.num_heads} query heads share {self.num_groups} heads of keys and "
                "values)"
            )
        return wanted

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The linears of a block that make its heads and read them, by their names within the block."""

    makers: Mapping[str, tuple[Role, ...]]
    """Linears whose rows make them, with whose rows those are, run after run."""

    reader: str
    """The linear whose columns read the query heads."""

    layout: HeadLayout

    def touches(self, own: str) -> bool:
        """Tell whether a parameter (its name within the block) becomes smaller where heads go."""
        return own.rpartition(".")[0] in self.makers or own == f"{self.reader}.weight"

    def left(self, own: str, tensor: torch.Tensor, kept: KeptHeads) -> torch.Tensor:
        """Return what is left of a block's parameter, itself where heads are no matter to it, else a copy."""
        if not self.touches(own):
            return tensor
        if own == f"{self.reader}.weight":
            return tensor[:, kept.query_features.nonzero()[:, 0].to(tensor.device)]
        roles = self.makers[own.rpartition(".")[0]]
        rows = [kept.query_features if role == "query" else kept.key_features for role in roles]
        return tensor[torch.cat(rows).nonzero()[:, 0].to(tensor.device)]

    def num_gone(self, own: str, shape: tuple[int, ...], left: HeadLayout) -> int:
        """Return how many numbers of a parameter of this shape go where these heads are left."""
        if not self.touches(own):
            return 0
        if own == f"{self.reader}.weight":
            return shape[0] * (self.layout.rows("query") - left.rows("query"))
        return prod(shape[1:]) * (shape[0] - self._rows_left(own, left))

    def shape_left(self, name: str, shape: tuple[int, int], left: HeadLayout) -> tuple[int, int]:
        """Return (out features, in features) of one of its linears, by its name, where these heads are left."""
        num_rows, num_columns = shape
        if name == self.reader:
            return num_rows, left.rows("query")
        return self._rows_left(f"{name}.weight", left), num_columns

    def _rows_left(self, own: str, left: HeadLayout) -> int:
        return sum(left.rows(role) for role in self.makers[own.rpartition(".")[0]])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCut:
    """Heads that have been taken out of a block."""

    attention: Attention
    kept: KeptHeads
    """On the CPU."""

    folded_OK: torch.Tensor | None = None
    """New values of what is left of the reader, in the dtype it is stored in; None where they are the source's."""

    def touches(self, own: str) -> bool:
        """Tell whether a parameter has become smaller."""
        return self.attention.touches(own)

    def folds(self, own: str) -> bool:
        """Tell whether a parameter has new values as well."""
        return self.folded_OK is not None and own == f"{self.attention.reader}.weight"

    def left(self, own: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what is to be stored of a parameter of the source."""
        if self.folded_OK is not None and self.folds(own):
            return self.folded_OK
        return self.attention.left(own, tensor, self.kept)


SEPARATE: Mapping[str, tuple[Role, ...]] = {
    "self_attn.q_proj": ("query",), "self_attn.k_proj": ("key",), "self_attn.v_proj": ("key",)
}  # fmt: skip
FUSED: Mapping[str, tuple[Role, ...]] = {"self_attn.qkv_proj": ("query", "key", "key")}

MAKERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite"), SEPARATE),
    "phi3": FUSED,
}
"""What makes the heads of a block by the `model_type` of its family."""


def layout_of(config: Any) -> HeadLayout:
    """Return the heads of a model's attention, by transformers' configuration of one of the families in MAKERS."""
    known, num_heads = config.to_dict(), config.num_attention_heads
    return HeadLayout(
        num_heads=num_heads,
        num_groups=known.get("num_key_value_heads") or num_heads,
        head_dim=known.get("head_dim") or config.hidden_size // num_heads,
    )


def attention_of(config: Any) -> Attention:
    """Return where the heads of a model's blocks are, by transformers' configuration of it.

    Raises ConfigError for families that are not known here.
    """
    if config.model_type not in MAKERS:
        raise ConfigError(
            f"no heads can be removed from the attention of {config.model_type} so far, only from that of "
            f"{', '.join(sorted(MAKERS))}; leave `heads` out and remove neurons, or whole blocks"
        )
    return Attention(makers=MAKERS[config.model_type], reader="self_attn.o_proj", layout=layout_of(config))
