"""The transaction that prunes one block: read, collect, prune, commit, propagate.

    read       the block's weights, by tensor name
    collect    run the dense block on the pruned stream; gather statistics of every distinct linear input
    prune      the recipe's steps in turn
    commit     write the block's shard, fsync, ledger line: from here a crash costs nothing
    propagate  run the pruned block; its outputs are the next boundary

The calibration sequences may be split over several replicas, each with the same block: statistics are summed over
them, solving is shared, and the first one writes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.activations import Boundary, Outlet, batches, require_finite
from pipeline.block_writer import round_block, write_block
from pipeline.errors import ConfigError, NumericsError
from pipeline.ledger import Commit
from pipeline.linears import Collector, Linear, find_linears
from pipeline.meter import Stopwatch
from pipeline.peers import Peers
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.shard_names import block_shard
from pipeline.shards import ShardReader
from pipeline.shelf import Shelf
from pipeline.skeleton import Skeleton
from pipeline.sparsity import SemiStructured, Sparsity, divides
from pipeline.statistics import relative_error
from pipeline.stream import Stream
from pipeline.workbench import Workbench, apply_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked of every block."""

    recipe: Recipe
    sparsity: Sparsity
    skip: tuple[str, ...] = ()
    batch: int = 4


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
    ) -> None:
        self._skeleton = skeleton
        self._order = order
        self._streams = streams
        self._shelf = shelf
        self._progress = progress
        self._peers = peers
        self._stream = Stream(skeleton, skeleton.checkpoint)

    def prefetch(self, index: int) -> None:
        """Have a block's weights read ahead while another one is worked on."""
        self._skeleton.checkpoint.will_need(self._skeleton.block_names(index).values())

    def prune(self, index: int) -> tuple[Commit | None, Stopwatch]:
        """Prune one block up to its written shard; once the commit is recorded, `propagate` or `drop` must follow.

        The commit is None on replicas that do not write.
        """
        watch = Stopwatch(self._skeleton.device)
        with self._phase(watch, index, "read"):
            block = self._skeleton.load_block(index, self._skeleton.checkpoint)
            linears = linears_to_prune(block, self._order.skip)
            check_divides(linears, block, self._order.sparsity)
        if not self._streams.pruned.has_begun:
            self._progress.phase(index, "wait")
            self._streams.pruned.read(slice(0, 1), self._skeleton.device)
        with self._phase(watch, index, "collect"):
            collector, targets = self._collect(index, linears)
        with self._phase(watch, index, "prune"), _naming(index):
            collector.sum_over(self._peers)
            collector.check_finite()
            inputs = self._streams.pruned
            bench = Workbench(self._stream, block, index, linears, collector, inputs, targets, self._peers)
            pruned = apply_recipe(self._order.recipe, self._order.sparsity, bench, self._progress.figures)
        with self._phase(watch, index, "commit"):
            if self._peers.rank > 0:
                round_block(self._skeleton, index, linears, pruned)
                return None, watch
            path = self._shelf.directory / block_shard(index, self._skeleton.num_blocks)
            records, shard = write_block(self._skeleton, index, linears, pruned, path)
            error = self._error(index, targets)
        commit = Commit(
            block=index, file=shard.file, sha256=shard.sha256, num_bytes=shard.num_bytes,
            linears=records, error=error, seconds=dict(watch.seconds),
        )  # fmt: skip
        return commit, watch

    def propagate(self, index: int, watch: Stopwatch, outlet: Outlet | None = None) -> None:
        """Run the pruned block over all sequences, handing its outputs on as they appear, then drop it."""
        with self._phase(watch, index, "propagate"):
            self._run_all(index, self._streams.pruned, f"pruned block {index}", outlet)
        self.drop(index)

    def drop(self, index: int) -> None:
        """Drop a block whose outputs nobody needs."""
        self._skeleton.release_block(index)

    def replay(self, index: int, commit: Commit, outlet: Outlet | None = None) -> None:
        """Advance the streams over a block that has been committed before.

        Raises RunDirectoryError when its shard is not the one that was committed.
        """
        self._progress.phase(index, "replay")
        if self._streams.dense is not None:
            self._skeleton.load_block(index, self._skeleton.checkpoint)
            self._run_all(index, self._streams.dense, f"dense block {index}")
        with self._shelf.take_out(commit) as path, ShardReader(path) as shard:
            self._skeleton.load_block(index, shard)
        self._run_all(index, self._streams.pruned, f"pruned block {index}", outlet)
        self.drop(index)

    @torch.no_grad()
    def _collect(self, index: int, linears: Sequence[Linear]) -> tuple[Collector, torch.Tensor]:
        """Gather statistics from the dense block; return them with the outputs the pruned block is to reproduce.

        Those come from the dense stream where the recipe asks for it, else from the pruned one: for all sequences
        where a block step compares with them, else for the first, on which the recorded error is measured.
        """
        pruned, dense, recipe = self._streams.pruned, self._streams.dense, self._order.recipe
        collector = Collector(linears, recipe.statistics)
        num_targets = 0 if dense is not None else pruned.num_sequences if recipe.needs_targets else 1
        targets = torch.empty_like(pruned.hidden_NTD[:num_targets])
        for sequences in batches(pruned.num_sequences if recipe.statistics else num_targets, self._order.batch):
            is_target = sequences.start < num_targets
            with collector.watching(self._skeleton.blocks[index], to_the_end=is_target):
                output = self._stream.run_block(index, pruned.read(sequences, self._skeleton.device))
                if is_target:
                    require_finite(output, f"dense block {index}")
                    targets[sequences].copy_(output[: num_targets - sequences.start])
        if dense is not None:
            self._run_all(index, dense, f"dense block {index}")
            targets = dense.hidden_NTD
        return collector, targets

    @torch.no_grad()
    def _run_all(self, index: int, boundary: Boundary, where: str, outlet: Outlet | None = None) -> None:
        """Replace a boundary by what the block, as it is loaded, makes of it; hand batches on where asked.

        What is handed on is the pruned stream, and with each of its batches the dense one's, where it is kept.
        """
        device = self._skeleton.device
        for sequences in boundary.batches(self._order.batch):
            output = self._stream.run_block(index, boundary.read(sequences, device))
            boundary.write(sequences, output, where)
            if outlet is not None:
                outlet.send("pruned", sequences, output)
                if self._streams.dense is not None:
                    outlet.send("dense", sequences, self._streams.dense.read(sequences, device))

    @torch.no_grad()
    def _error(self, index: int, targets: torch.Tensor) -> float:
        """Return the relative error of the pruned block on the first sequence."""
        output = self._stream.run_block(index, self._streams.pruned.read(slice(0, 1), self._skeleton.device))
        require_finite(output, f"pruned block {index}")
        return relative_error(output, targets[:1].to(output.device)).item()

    @contextmanager
    def _phase(self, watch: Stopwatch, index: int, name: str) -> Iterator[None]:
        self._progress.phase(index, name)
        with watch.phase(name):
            yield


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


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Put the block's number before the message of a method's NumericsError."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"block {index}: {error.message}") from error


def check_divides(linears: Sequence[Linear], block: nn.Module, sparsity: Sparsity) -> None:
    """Raise ConfigError when an N:M group does not divide a linear's rows."""
    for linear in linears:
        num_columns = linear.weight(block).shape[1]
        if isinstance(sparsity, SemiStructured) and not divides(sparsity, num_columns):
            raise ConfigError(
                f"{linear.name} has {num_columns} input features, not a multiple of the group of {sparsity.group} "
                f"in {sparsity}; add it to prune.skip, or use another pattern or an unstructured sparsity"
            )
