"""Neurons taken out of one block after the other, and what is left put in its place.

What is left is rounded to the dtype it is stored in before anything else sees it: later steps prune what is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.anatomy import Cut, Mlp, kept_as_text, mlp_of
from pipeline.block_widths import Width, each_width, width_at
from pipeline.errors import ConfigError
from pipeline.linears import Collector, find_linears
from pipeline.methods.step import Report
from pipeline.methods.structured.narrowing import CutBlock, Narrowing, Neurons
from pipeline.order import Order
from pipeline.records import CutRecord
from pipeline.skeleton import Skeleton
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

    @classmethod
    def of(cls, skeleton: Skeleton, order: Order, num_sequences: int) -> "Cutting | None":
        """Return what an order asks; None where all neurons stay. Raises ConfigError for unknown families."""
        step = order.recipe.narrowing
        if step is None or order.width is None:
            return None
        mlp = mlp_of(skeleton.model.config)
        skipped = {linear.name for linear in find_linears(skeleton.blocks[0], order.skip)}
        if not {*mlp.makers, mlp.reader} <= skipped:
            raise ConfigError(
                f"prune.skip leaves {', '.join(order.skip)} dense, but removing neurons makes "
                f"{', '.join((*mlp.makers, mlp.reader))} smaller; skip none of these"
            )
        return cls(skeleton=skeleton, step=step, mlp=mlp, width=order.width, num_fitted=step.num_fitted(num_sequences))

    @property
    def columns_left(self) -> dict[str, Sequence[int]]:
        """Input features that are left of a linear: in any block, so that what does not divide shows in the first."""
        return {self.mlp.reader: sorted(set(each_width(self.width, 1)))}

    def collector(self, block: nn.Module) -> Collector:
        """Return what gathers statistics of a block's neurons."""
        readers = [linear for linear in find_linears(block) if linear.name == self.mlp.reader]
        return Collector(readers, self.step.neuron_statistics)

    def num_fitted_of(self, sequences: slice) -> int:
        """Return how many of these sequences are learnt from, the first of them."""
        fitted: int = min(self.num_fitted, sequences.stop) - sequences.start
        return max(0, fitted)

    def cut(self, index: int, bench: Workbench, collector: Collector, report: Report) -> CutRecord:
        """Take neurons out of a block that has been collected; what is left takes its place, on the bench too."""
        collector.sum_over(bench.peers)
        collector.check_finite()
        reader = self.mlp.reader
        neurons = Neurons(
            reader=reader, num_kept=width_at(self.width, index), gathered=collector.gathered(reader),
            num_fitted=self.num_fitted,
        )  # fmt: skip
        made = self.step.cut(bench, neurons, report)
        bench.let_go()
        cut = self._put(index, made)
        bench.replace(self.skeleton.blocks[index], cut)
        if made.bias_O is not None:
            bias = f"{reader}.bias"
            bench.tuned[bias] = made.bias_O.to(self._stored_dtype(index, bias))
        return CutRecord(
            num_neurons=len(cut.keep_U), kept=kept_as_text(cut.keep_U), removed=cut.num_removed,
            rewritten=cut.folded_OK is not None, notes=made.notes,
        )  # fmt: skip

    def _put(self, index: int, made: CutBlock) -> Cut:
        """Put what is left of a block in its place, each tensor as its dense one is let go."""
        skeleton, keep_U = self.skeleton, made.keep_U.cpu()
        before = self._numel(index)
        cut = Cut(mlp=self.mlp, keep_U=keep_U, folded_OK=self._as_stored(index, made.folded_OK))
        dense = skeleton.reshape_block(index, width_at(self.width, index))
        for own in skeleton.block_names(index):
            tensor = dense.state_dict()[own]
            skeleton.put(index, own, cut.left(own, tensor))
            del tensor
            skeleton.release(dense, [own])
        return replace(cut, num_removed=before - self._numel(index))

    def _as_stored(self, index: int, folded_OK: torch.Tensor | None) -> torch.Tensor | None:
        """New values of the reader as they will be read back."""
        if folded_OK is None:
            return None
        return folded_OK.to("cpu", self._stored_dtype(index, f"{self.mlp.reader}.weight")).contiguous()

    def _stored_dtype(self, index: int, own: str) -> torch.dtype:
        return self.skeleton.checkpoint.tensors[self.skeleton.block_names(index)[own]].dtype

    def _numel(self, index: int) -> int:
        """Numbers of a block as it is now, but for tensors that the source has not."""
        names, in_files = self.skeleton.block_names(index), self.skeleton.checkpoint.shard_of
        return sum(p.numel() for own, p in self.skeleton.blocks[index].named_parameters() if names[own] in in_files)
