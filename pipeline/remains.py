"""What a ledger says is left of the blocks of a source, for whoever holds an output against it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from pipeline.anatomy import Cut, kept_from_text, mlp_of
from pipeline.records import Commit
from pipeline.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left of one block of which neurons may be gone."""

    cut: Cut | None
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters that have become smaller, by their names within the block."""

    folded: str | None
    """The one among them that has new values as well."""

    def left(self, own: str, source: torch.Tensor) -> torch.Tensor:
        """Return what is left of a parameter of the source, before anything else was done to it."""
        return source if self.cut is None else self.cut.left(own, source)


def remains_of(skeleton: Skeleton, commit: Commit) -> Remains:
    """Return what a commit has left of its block."""
    if commit.cut is None:
        return Remains(cut=None, shapes={}, folded=None)
    mlp = mlp_of(skeleton.model.config)
    cut = Cut(mlp=mlp, keep_U=kept_from_text(commit.cut.kept, commit.cut.num_neurons))
    smaller = {
        own: tuple(cut.left(own, parameter.data).shape)
        for own, parameter in skeleton.blocks[commit.block].named_parameters()
        if mlp.touches(own)
    }
    return Remains(cut=cut, shapes=smaller, folded=f"{mlp.reader}.weight" if commit.cut.rewritten else None)


def neurons_as_data(commits: Mapping[int, Commit]) -> dict[str, JsonValue]:
    """Return which neurons every block has kept (hexadecimal, a bit each), and whether what is left was mended.

    As plain data, for what a model says about itself; empty where none are gone.
    """
    cuts = [commit.cut for _, commit in sorted(commits.items()) if commit.cut is not None]
    kept: JsonValue = [cut.kept for cut in cuts]
    mended: JsonValue = [cut.notes.get("recovered") == 1.0 for cut in cuts]
    return {"neurons": {"kept": kept, "mended": mended}} if cuts else {}
