"""Neurons and heads taken out of one block after the other, and what is left put in its place.

What is left is rounded to the dtype it is stored in before anything else sees it: later steps prune what is written.
Heads go before neurons, so that what makes up for these, and is judged, knows of those. Where statistics are gathered
anew (`within_block: sequential`) the neurons' are those of the block without these heads, else of the dense block.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.anatomy import Cut, Mlp, kept_as_text, mlp_of
from pipeline.attention import Attention, HeadCut, HeadLayout, attention_of
from pipeline.block_widths import Width, each_width, width_at
from pipeline.errors import ConfigError
from pipeline.linears import Collector, Linear, find_linears
from pipeline.methods.step import Report
from pipeline.methods.structured.narrowing import Narrowing, Units
from pipeline.order import Order
from pipeline.records import CutRecord, HeadsRecord
from pipeline.skeleton import Skeleton
from pipeline.statistics import Gathered
from pipeline.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """What is asked of every block of a stage."""

    skeleton: Skeleton
    step: Narrowing
    mlp: Mlp
    width: Width
    """Neurons that are to be left in every block, or in each."""

    num_fitted: int
    """Sequences at hand, from the first on, that are learnt from."""

    attention: Attention | None = None
    """Where heads are, if any are to go."""

    heads: HeadLayout | None = None
    """Those that are to be left."""

    gathers_anew: int = 0
    """Sequences at once of which the neurons' statistics are gathered again once heads are gone; 0: they are not."""

    @classmethod
    def of(cls, skeleton: Skeleton, order: Order, num_sequences: int) -> "Cutting | None":
        """Return what an order asks; None where all neurons stay. Raises ConfigError for unknown families."""
        step = order.recipe.narrowing
        if step is None or order.width is None:
            return None
        mlp, config = mlp_of(skeleton.model.config), skeleton.model.config
        attention = None if order.heads is None else attention_of(config)
        _require_not_skipped(skeleton, order.skip, (*mlp.makers, mlp.reader), "neurons")
        if attention is not None:
            _require_not_skipped(skeleton, order.skip, (*attention.makers, attention.reader), "heads")
        return cls(
            skeleton=skeleton, step=step, mlp=mlp, width=order.width, num_fitted=step.num_fitted(num_sequences),
            attention=attention, heads=order.heads,
            gathers_anew=order.batch if order.recipe.within_block == "sequential" else 0,
        )  # fmt: skip

    @property
    def columns_left(self) -> dict[str, Sequence[int]]:
        """Input features that are left of a linear: in any block, so that what does not divide shows in the first."""
        left: dict[str, Sequence[int]] = {self.mlp.reader: sorted(set(each_width(self.width, 1)))}
        if self.attention is not None and self.heads is not None:
            left[self.attention.reader] = [self.heads.rows("query")]
        return left

    def collector(self, block: nn.Module) -> Collector:
        """Return what gathers statistics of a block's neurons, and of its heads where some go."""
        anew = [self.mlp.reader] if self.attention is not None and self.gathers_anew else []
        return Collector(self._readers(block, self.columns_left.keys() - anew), self.step.neuron_statistics)

    def num_fitted_of(self, sequences: slice) -> int:
        """Return how many of these sequences are learnt from, the first of them."""
        fitted: int = min(self.num_fitted, sequences.stop) - sequences.start
        return max(0, fitted)

    def cut(self, index: int, bench: Workbench, collector: Collector, report: Report) -> CutRecord:
        """Take heads and neurons out of a block that has been collected; what is left takes its place, on the bench."""
        collector.sum_over(bench.peers)
        collector.check_finite()
        before, heads, heads_record = self._numel(index), None, None
        if self.attention is not None and self.heads is not None:
            heads, heads_record = self._cut_heads(index, bench, collector, self.attention, self.heads, report)
        anew = heads is not None and self.gathers_anew
        gathered = self._gathered_anew(index, bench) if anew else collector.gathered(self.mlp.reader)
        cut, notes = self._cut_neurons(index, bench, gathered, report)
        bench.cut = replace(cut, heads=heads, num_removed=before - self._numel(index))
        return CutRecord(
            num_neurons=len(cut.keep_U), kept=kept_as_text(cut.keep_U), removed=bench.cut.num_removed,
            rewritten=cut.folded_OK is not None, notes=notes, heads=heads_record,
        )  # fmt: skip

    def _cut_heads(
        self,
        index: int,
        bench: Workbench,
        collector: Collector,
        attention: Attention,
        left: HeadLayout,
        report: Report,
    ) -> tuple[HeadCut, HeadsRecord]:
        """Take heads out of a dense block."""
        reader, layout, unit = attention.reader, attention.layout, self.step.head_unit
        units = Units(
            reader=reader, unit_size=layout.unit_size(unit), num_pools=layout.num_pools(unit),
            num_kept=left.per_pool(unit) * left.num_pools(unit), gathered=collector.gathered(reader),
            num_fitted=self.num_fitted,
        )  # fmt: skip
        made = self.step.cut(bench, units, report)
        bench.let_go()
        kept = layout.kept(made.keep_U.cpu(), unit)
        cut = HeadCut(attention=attention, kept=kept, folded_OK=self._as_stored(index, reader, made.folded_OK))
        dense_width = self.skeleton.shape_of(index, f"{self.mlp.reader}.weight")[1]
        self._put(index, cut, dense_width)
        bench.replace(self.skeleton.blocks[index], reader, kept.query_features)
        return cut, HeadsRecord(
            unit=unit, num_units=len(made.keep_U), kept=kept_as_text(made.keep_U), num_heads=left.num_heads,
            num_groups=left.num_groups, rewritten=cut.folded_OK is not None, notes=made.notes,
        )  # fmt: skip

    def _cut_neurons(
        self, index: int, bench: Workbench, gathered: Gathered, report: Report
    ) -> tuple[Cut, dict[str, float]]:
        """Take neurons out of a block that is dense but for its heads; with what is left come the figures of it."""
        reader, width = self.mlp.reader, width_at(self.width, index)
        neurons = Units(reader=reader, num_kept=width, gathered=gathered, num_fitted=self.num_fitted)
        made = self.step.cut(bench, neurons, report)
        bench.let_go()
        cut = Cut(mlp=self.mlp, keep_U=made.keep_U.cpu(), folded_OK=self._as_stored(index, reader, made.folded_OK))
        self._put(index, cut, width)
        bench.replace(self.skeleton.blocks[index], reader, cut.keep_U)
        if made.bias_O is not None:
            bench.tuned[neurons.reader_bias] = made.bias_O.to(self._stored_dtype(index, neurons.reader_bias))
        return cut, made.notes

    def _gathered_anew(self, index: int, bench: Workbench) -> Gathered:
        """Return the statistics of the neurons of the block as it is by now."""
        readers = self._readers(self.skeleton.blocks[index], [self.mlp.reader])
        return bench.collect_again(readers, self.step.neuron_statistics, self.gathers_anew, self.num_fitted)

    def _put(self, index: int, cut: Cut | HeadCut, width: int) -> None:
        """Put what is left of a block in its place, each tensor as its larger one is let go."""
        skeleton = self.skeleton
        larger = skeleton.reshape_block(index, width, self.heads)
        for own in skeleton.block_names(index):
            tensor = larger.state_dict()[own]
            skeleton.put(index, own, cut.left(own, tensor))
            del tensor
            skeleton.release(larger, [own])

    def _as_stored(self, index: int, reader: str, folded_OK: torch.Tensor | None) -> torch.Tensor | None:
        """New values of a reader as they will be read back."""
        if folded_OK is None:
            return None
        return folded_OK.to("cpu", self._stored_dtype(index, f"{reader}.weight")).contiguous()

    def _stored_dtype(self, index: int, own: str) -> torch.dtype:
        return self.skeleton.checkpoint.tensors[self.skeleton.block_names(index)[own]].dtype

    def _numel(self, index: int) -> int:
        """Numbers of a block as it is by now, but for tensors that the source has not."""
        names, in_files = self.skeleton.block_names(index), self.skeleton.checkpoint.shard_of
        return sum(p.numel() for own, p in self.skeleton.blocks[index].named_parameters() if names[own] in in_files)

    @staticmethod
    def _readers(block: nn.Module, names: Container[str]) -> list[Linear]:
        return [linear for linear in find_linears(block) if linear.name in names]


def _require_not_skipped(skeleton: Skeleton, skip: tuple[str, ...], names: tuple[str, ...], what: str) -> None:
    """Raise ConfigError where what becomes smaller is to stay dense."""
    if not set(names) <= {linear.name for linear in find_linears(skeleton.blocks[0], skip)}:
        raise ConfigError(
            f"prune.skip leaves {', '.join(skip)} dense, but removing {what} makes {', '.join(names)} smaller; skip "
            "none of these"
        )
