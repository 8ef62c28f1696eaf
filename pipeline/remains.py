"""What a ledger says is left of the blocks of a source, for whoever holds an output against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from pipeline.anatomy import Cut, kept_from_text, mlp_of
from pipeline.attention import HeadCut, HeadLayout, attention_of
from pipeline.records import Commit, CutRecord, HeadsRecord
from pipeline.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left of one block of which neurons and heads may be gone."""

    cut: Cut | None
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters that have become smaller, by their names within the block."""

    folded: frozenset[str] = frozenset()
    """Those among them that have new values as well."""

    def lost(self, own: str) -> str:
        """Return what a parameter that has become smaller has lost."""
        heads = None if self.cut is None else self.cut.heads
        return "heads" if heads is not None and heads.touches(own) else "neurons"

    def left(self, own: str, source: torch.Tensor) -> torch.Tensor:
        """Return what is left of a parameter of the source, before anything else was done to it."""
        return source if self.cut is None else self.cut.left(own, source)


def remains_of(skeleton: Skeleton, commit: Commit) -> Remains:
    """Return what a commit has left of its block."""
    if commit.cut is None:
        return Remains(cut=None, shapes={})
    mlp, heads = mlp_of(skeleton.model.config), _heads_of(skeleton, commit.cut.heads)
    cut = Cut(mlp=mlp, keep_U=kept_from_text(commit.cut.kept, commit.cut.num_neurons), heads=heads)
    smaller = {
        own: tuple(cut.left(own, parameter.data).shape)
        for own, parameter in skeleton.blocks[commit.block].named_parameters()
        if cut.touches(own)
    }
    folded = {f"{mlp.reader}.weight"} if commit.cut.rewritten else set()
    if heads is not None and commit.cut.heads is not None and commit.cut.heads.rewritten:
        folded.add(f"{heads.attention.reader}.weight")
    return Remains(cut=cut, shapes=smaller, folded=frozenset(folded))


def _heads_of(skeleton: Skeleton, record: HeadsRecord | None) -> HeadCut | None:
    """Return what a commit has taken out of its block's attention, if anything."""
    if record is None:
        return None
    attention = attention_of(skeleton.model.config)
    keep_U = kept_from_text(record.kept, record.num_units)
    return HeadCut(attention=attention, kept=attention.layout.kept(keep_U, record.unit))


def heads_left_by(skeleton: Skeleton, commit: Commit) -> HeadLayout | None:
    """Return the heads of the block that a commit has left; None where they are those of the dense block."""
    if commit.cut is None or commit.cut.heads is None:
        return None
    left, head_dim = commit.cut.heads, attention_of(skeleton.model.config).layout.head_dim
    return HeadLayout(num_heads=left.num_heads, num_groups=left.num_groups, head_dim=head_dim)


def neurons_as_data(commits: Mapping[int, Commit]) -> dict[str, JsonValue]:
    """Return which neurons and heads every block has kept (hexadecimal, a bit each), and where what is left was mended.

    As plain data, for what a model says about itself; empty where none are gone.
    """
    cuts = [commit.cut for _, commit in sorted(commits.items()) if commit.cut is not None]
    heads = [cut.heads for cut in cuts if cut.heads is not None]
    data: dict[str, JsonValue] = {"neurons": _as_data(cuts)} if cuts else {}
    if heads:
        data["heads"] = {"unit": heads[0].unit, **_as_data(heads)}
    return data


def _as_data(cuts: Sequence[CutRecord] | Sequence[HeadsRecord]) -> dict[str, JsonValue]:
    return {"kept": [cut.kept for cut in cuts], "mended": [cut.notes.get("recovered") == 1.0 for cut in cuts]}
