"""The transaction that prunes one block: read, collect, prune, commit, propagate.

    read       the block's weights, by tensor name
    collect    run the dense block on the pruned stream; gather statistics of every distinct linear input
    prune      the recipe's steps in turn
    commit     write the block's shard, fsync, ledger line: from here a crash costs nothing
    propagate  run the pruned block; its outputs are the next boundary

Where both blocks fit, the next one is collected from each batch as it is propagated: hidden states are then read and
written once a block instead of being read twice. The calibration sequences may be split over several replicas, each
with the same block: statistics are summed over them, solving is shared, and the first one writes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.activations import Boundary, Outlet, in_memory, require_finite
from pipeline.begun import Begun
from pipeline.block_writer import round_block, write_block
from pipeline.cutting import Cutting
from pipeline.memory import Memory
from pipeline.meter import Stopwatch
from pipeline.numerics import naming_block
from pipeline.order import Order
from pipeline.peers import Peers
from pipeline.progress import Progress
from pipeline.prune_block import apply_recipe
from pipeline.records import Commit
from pipeline.remains import heads_left_by
from pipeline.shard_names import block_shard
from pipeline.shards import ShardReader
from pipeline.shelf import Shelf
from pipeline.skeleton import Skeleton
from pipeline.statistics import relative_error
from pipeline.stream import Stream
from pipeline.stream_names import StreamName
from pipeline.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The boundary that has been reached."""

    pruned: Boundary
    """Made by the pruned blocks so far."""

    dense: Boundary | None
    """Made by the dense blocks so far; kept only when the recipe asks for it."""


class Transaction:
    """Prunes blocks one after the other, advancing the streams."""

    def __init__(
        self,
        skeleton: Skeleton,
        order: Order,
        streams: Streams,
        shelf: Shelf,
        progress: Progress,
        peers: Peers,
        memory: Memory,
    ) -> None:
        self._skeleton, self._order, self._streams = skeleton, order, streams
        self._shelf, self._progress, self._peers, self._memory = shelf, progress, peers, memory
        self._stream = Stream(skeleton, skeleton.checkpoint)
        self._weights = memory.weights_of(skeleton)
        self._cutting = Cutting.of(skeleton, order, streams.pruned.num_sequences)
        self._own_targets = self._make_targets()
        self._collected: Begun | None = None
        """The next block, where it was collected while this one was propagated."""

        self._first_BTD: torch.Tensor | None = None
        """The first sequence as it enters the block that was collected last: for the error that is recorded."""

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End reading ahead, count what was moved, and give back the targets; the streams are whose they were."""
        self._weights.close()
        self._memory.count(self._weights, self._streams.pruned, self._streams.dense, self._own_targets)
        if self._own_targets is not None:
            self._own_targets.close()

    def prune(self, index: int, following: Sequence[int] = ()) -> tuple[Commit | None, Stopwatch]:
        """Prune one block up to its written shard; once the commit is recorded, `propagate` or `drop` must follow.

        The weights of the first of the stage's following blocks are read meanwhile, where they fit. The commit is None
        on replicas that do not write.
        """
        collected, self._collected = self._collected, None
        begun = collected or self._begin(index)
        assert begun.index == index, f"block {begun.index} was collected, and {index} is to be pruned"
        if self._memory.ahead and following:
            self._weights.expect(following[0])
        if collected is None:
            self._collect(begun)
        watch, linears, sparsity = begun.watch, begun.linears, self._order.allocation.of(index)
        with self._phase(watch, index, "prune"), naming_block(index):
            begun.collector.sum_over(self._peers)
            begun.collector.check_finite()
            bench, cut = self._bench(begun), None
            if self._cutting is not None:
                cut = self._cutting.cut(index, bench, begun.neurons, self._progress.figures)
            pruned = apply_recipe(self._order.recipe, sparsity, bench, self._progress.figures, self._order.batch)
        with self._phase(watch, index, "commit"):
            if self._peers.rank > 0:
                round_block(self._skeleton, index, linears, pruned)
                return None, watch
            path = self._shelf.directory / block_shard(index, self._skeleton.num_blocks)
            records, shard = write_block(self._skeleton, index, linears, pruned, path)
            error = self._error(index)
        commit = Commit(
            block=index, file=shard.file, sha256=shard.sha256, num_bytes=shard.num_bytes,
            linears=records, error=error, seconds=dict(watch.seconds), tuned=sorted(pruned.others),
            cut=cut,
        )  # fmt: skip
        return commit, watch

    def propagate(
        self, index: int, watch: Stopwatch, outlet: Outlet | None = None, following: Sequence[int] = ()
    ) -> None:
        """Run the pruned block over all sequences, handing its outputs on as they appear, then drop it.

        The first of the stage's following blocks is collected from them meanwhile, where both blocks fit, and the
        weights of the second are read, where three do.
        """
        begun = self._begin(following[0]) if following and self._memory.fused else None
        if begun is not None and self._memory.ahead > 1 and len(following) > 1:
            self._weights.expect(following[1])
        self._progress.phase(index, "propagate")
        with self._memory.phase("propagate" if begun is None else "fused"):
            for sequences, hidden_BTD in self._streams.pruned.stream(self._order.batch, self._skeleton.device):
                with watch.phase("propagate"):
                    output = self._advance(index, sequences, hidden_BTD, f"pruned block {index}", outlet)
                if begun is not None:
                    with begun.watch.phase("collect"):
                        self._gather(begun, sequences, output)
        self.drop(index)
        if begun is not None:
            with begun.watch.phase("collect"), self._memory.phase("collect"):
                self._advance_dense(begun.index)
            self._collected = begun

    def drop(self, index: int) -> None:
        """Drop a block whose outputs nobody needs."""
        self._weights.drop(index)

    def replay(self, index: int, commit: Commit, outlet: Outlet | None = None) -> None:
        """Advance the streams over a block that has been committed before.

        Raises RunDirectoryError when its shard is not the one that was committed.
        """
        self._progress.phase(index, "replay")
        if self._streams.dense is not None:
            self._weights.load(index)
            self._advance_dense(index)
        with self._shelf.take_out(commit) as path, ShardReader(path) as shard:
            width = None if commit.cut is None else commit.cut.width
            self._weights.load(index, shard, width, heads_left_by(self._skeleton, commit))
        for sequences, hidden_BTD in self._streams.pruned.stream(self._order.batch, self._skeleton.device):
            self._advance(index, sequences, hidden_BTD, f"pruned block {index}", outlet)
        self.drop(index)

    def _begin(self, index: int) -> Begun:
        """Read a block."""
        watch = Stopwatch(self._skeleton.device)
        with self._phase(watch, index, "read"):
            block = self._weights.load(index)
            return Begun.of(index, block, self._order, self._cutting, watch)

    def _bench(self, begun: Begun) -> Workbench:
        """Lay out a block that has been collected, with the outputs that it is to reproduce."""
        named: dict[StreamName, Boundary | None] = {"pruned": self._own_targets, "dense": self._streams.dense}
        targets = {name: boundary for name, boundary in named.items() if boundary is not None}
        return Workbench(
            self._stream, begun.block, begun.index, begun.linears, begun.collector, self._streams.pruned, targets,
            self._peers,
        )  # fmt: skip

    def _collect(self, begun: Begun) -> None:
        """Gather statistics of a block from the boundary that has been reached."""
        index, pruned = begun.index, self._streams.pruned
        if not pruned.has_begun:
            self._progress.phase(index, "wait")
            pruned.read(slice(0, 1), self._skeleton.device)
        with self._phase(begun.watch, index, "collect"):
            wanted = pruned.num_sequences if begun.looks_at_all else max(1, self._num_targets)
            for sequences, hidden_BTD in pruned.stream(self._order.batch, self._skeleton.device, wanted):
                self._gather(begun, sequences, hidden_BTD)
            self._advance_dense(index)

    @torch.no_grad()
    def _gather(self, begun: Begun, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Run a dense block on one batch of the pruned stream: statistics, and targets where they are made of it."""
        if sequences.start == 0:
            self._first_BTD = hidden_BTD[:1].clone()
        num_targets = min(self._num_targets, sequences.stop) - sequences.start
        if num_targets <= 0 and not begun.looks_at_all:
            return
        if not begun.looks_at_all:
            hidden_BTD = hidden_BTD[:num_targets]
        with begun.watching(sequences, to_the_end=num_targets > 0):
            output = self._stream.run_block(begun.index, hidden_BTD)
            if self._own_targets is not None and num_targets > 0:
                wanted = slice(sequences.start, sequences.start + num_targets)
                self._own_targets.write(wanted, output[:num_targets], f"dense block {begun.index}")

    @torch.no_grad()
    def _advance(
        self, index: int, sequences: slice, hidden_BTD: torch.Tensor, where: str, outlet: Outlet | None
    ) -> torch.Tensor:
        """Replace one batch of the pruned stream by what a block makes of it, and return that; hand it on where asked.

        With each of its batches goes the dense stream's, where that is kept.
        """
        output = self._stream.run_block(index, hidden_BTD).to(self._streams.pruned.dtype)
        self._streams.pruned.write(sequences, output, where)
        if outlet is not None:
            outlet.send("pruned", sequences, output)
            if self._streams.dense is not None:
                outlet.send("dense", sequences, self._streams.dense.read(sequences, self._skeleton.device))
        return output

    @torch.no_grad()
    def _advance_dense(self, index: int) -> None:
        """Run a dense block, which is loaded, over the dense stream, where there is one."""
        dense = self._streams.dense
        if dense is not None:
            for sequences, hidden_BTD in dense.stream(self._order.batch, self._skeleton.device):
                dense.write(sequences, self._stream.run_block(index, hidden_BTD), f"dense block {index}")

    @property
    def _num_targets(self) -> int:
        return 0 if self._own_targets is None else self._own_targets.num_sequences

    def _make_targets(self) -> Boundary | None:
        """Make room for the dense block's outputs on the pruned stream.

        Of all sequences where a block step compares with them; else of the first, on which the recorded error is
        measured, unless the dense stream, once advanced, can serve for that.
        """
        if self._streams.dense is not None and not self._order.recipe.needs_targets:
            return None
        num_sequences, *rest = self._streams.pruned.shape
        dtype = self._streams.pruned.dtype
        if self._order.recipe.needs_targets:
            return self._memory.store.boundary("targets", (num_sequences, rest[0], rest[1]), dtype)
        return in_memory().boundary("targets", (1, rest[0], rest[1]), dtype)

    @torch.no_grad()
    def _error(self, index: int) -> float:
        """Return the relative error of the pruned block on the first sequence."""
        assert self._first_BTD is not None, "a block is collected before it is pruned"
        output = self._stream.run_block(index, self._first_BTD)
        require_finite(output, f"pruned block {index}")
        targets = self._own_targets or self._streams.dense
        assert targets is not None, "there is one of them"
        return relative_error(output, targets.read(slice(0, 1), self._skeleton.device)).item()

    @contextmanager
    def _phase(self, watch: Stopwatch, index: int, name: str) -> Iterator[None]:
        self._progress.phase(index, name)
        with watch.phase(name), self._memory.phase(name):
            yield
