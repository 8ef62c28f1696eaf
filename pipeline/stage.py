"""The transaction that prunes one block: read, collect, prune, commit, propagate.

    read       the block's weights, by tensor name
    collect    run the dense block on the pruned stream; gather statistics of every distinct linear input
    prune      the recipe's steps in turn
    commit     write the block's shard, fsync, ledger line: from here a crash costs nothing
    propagate  run the pruned block; its outputs are the next boundary

What propagates is what was written: weights are rounded to the stored dtype first, so that a resumed run, which
reads them back, sees the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.activations import Boundary, batches, require_finite
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError, NumericsError, RunDirectoryError
from pipeline.ledger import Commit, LinearRecord
from pipeline.linears import Collector, Linear, find_linears
from pipeline.meter import Stopwatch
from pipeline.methods.step import PrunedLinear
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.shard_names import block_shard
from pipeline.shards import OutputTensor, ShardReader, WrittenShard, hash_file, tensor_chunks, write_shard
from pipeline.skeleton import Skeleton
from pipeline.sparsity import SemiStructured, Sparsity, divides
from pipeline.statistics import relative_error
from pipeline.stream import Stream
from pipeline.workbench import Workbench, apply_recipe

INTEGERS = {2: torch.int16, 4: torch.int32}
"""Integer dtype of the same size as a stored float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked of every block."""

    recipe: Recipe
    sparsity: Sparsity
    skip: tuple[str, ...] = ()
    batch: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The boundary this stage has reached."""

    pruned: Boundary
    """Made by the pruned blocks so far."""

    dense: Boundary | None
    """Made by the dense blocks so far; kept only when the recipe asks for it."""


class Stage:
    """Prunes blocks one after the other, advancing its streams."""

    def __init__(
        self, skeleton: Skeleton, order: Order, streams: Streams, model_directory: Path, progress: Progress
    ) -> None:
        self._skeleton = skeleton
        self._order = order
        self._streams = streams
        self._directory = model_directory
        self._progress = progress
        self._stream = Stream(skeleton, skeleton.checkpoint)

    def prune_block(self, index: int) -> tuple[Commit, Stopwatch]:
        """Prune one block up to its written shard; once the commit is recorded, `propagate` must follow."""
        watch = Stopwatch(self._skeleton.device)
        with self._phase(watch, index, "read"):
            block = self._skeleton.load_block(index, self._skeleton.checkpoint)
            linears = linears_to_prune(block, self._order.skip)
            check_divides(linears, block, self._order.sparsity)
        with self._phase(watch, index, "collect"):
            collector, targets = self._collect(index, linears)
        with self._phase(watch, index, "prune"):
            bench = Workbench(self._stream, block, index, linears, collector, self._streams.pruned, targets)
            with _naming(index):
                pruned = apply_recipe(self._order.recipe, self._order.sparsity, bench, self._progress.figures)
        with self._phase(watch, index, "commit"):
            records, shard = self._write(index, linears, pruned)
            error = self._error(index, targets)
        commit = Commit(
            block=index, file=shard.file, sha256=shard.sha256, num_bytes=shard.num_bytes,
            linears=records, error=error, seconds=dict(watch.seconds),
        )  # fmt: skip
        return commit, watch

    def propagate(self, index: int, watch: Stopwatch) -> None:
        """Run the pruned block over all sequences, then drop it."""
        with self._phase(watch, index, "propagate"):
            self._run_all(index, self._streams.pruned, f"pruned block {index}")
        self._skeleton.release_block(index)

    def replay(self, index: int, commit: Commit) -> None:
        """Advance the streams over a block that an earlier run has committed.

        Raises RunDirectoryError when its shard is not the one that was committed.
        """
        self._progress.phase(index, "replay")
        path = self._directory / commit.file
        require_committed(path, commit)
        if self._streams.dense is not None:
            self._skeleton.load_block(index, self._skeleton.checkpoint)
            self._run_all(index, self._streams.dense, f"dense block {index}")
        with ShardReader(path) as shard:
            self._skeleton.load_block(index, shard)
        self._run_all(index, self._streams.pruned, f"pruned block {index}")
        self._skeleton.release_block(index)

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
        collector.check_finite(f"block {index}")
        if dense is not None:
            self._run_all(index, dense, f"dense block {index}")
            targets = dense.hidden_NTD
        return collector, targets

    @torch.no_grad()
    def _run_all(self, index: int, boundary: Boundary, where: str) -> None:
        """Replace a boundary by what the block, as it is loaded, makes of it."""
        for sequences in boundary.batches(self._order.batch):
            hidden_BTD = boundary.read(sequences, self._skeleton.device)
            boundary.write(sequences, self._stream.run_block(index, hidden_BTD), where)

    @torch.no_grad()
    def _error(self, index: int, targets: torch.Tensor) -> float:
        """Return the relative error of the pruned block on the first sequence."""
        output = self._stream.run_block(index, self._streams.pruned.read(slice(0, 1), self._skeleton.device))
        require_finite(output, f"pruned block {index}")
        return relative_error(output, targets[:1].to(output.device)).item()

    def _write(
        self, index: int, linears: Sequence[Linear], pruned: Mapping[str, PrunedLinear]
    ) -> tuple[dict[str, LinearRecord], WrittenShard]:
        """Write the block's shard, one tensor in memory at a time, and put what was written into the block."""
        checkpoint, block = self._skeleton.checkpoint, self._skeleton.blocks[index]
        by_parameter = {linear.parameter: linear for linear in linears}
        records: dict[str, LinearRecord] = {}
        outputs = []
        for own, stored in self._skeleton.block_names(index).items():
            linear, entry = by_parameter.get(own), checkpoint.tensors[stored]
            if linear is None:
                chunks = partial(checkpoint.chunks, stored)
            else:
                chunks = partial(_pruned_chunks, checkpoint, stored, linear, block, pruned[linear.name], records)
            outputs.append(OutputTensor(name=stored, dtype=entry.dtype, shape=entry.shape, chunks=chunks))
        path = self._directory / block_shard(index, self._skeleton.num_blocks)
        return records, write_shard(path, outputs)

    @contextmanager
    def _phase(self, watch: Stopwatch, index: int, name: str) -> Iterator[None]:
        self._progress.phase(index, name)
        with watch.phase(name):
            yield


def _pruned_chunks(
    checkpoint: Checkpoint,
    stored: str,
    linear: Linear,
    block: nn.Module,
    pruned: PrunedLinear,
    records: dict[str, LinearRecord],
) -> Iterator[memoryview]:
    """Make one pruned tensor in its stored dtype, put it into the block, record its counts, and yield its bytes.

    Weights that were only masked are taken from the source again, so that kept ones stay as they are to the bit,
    whatever the compute dtype.
    """
    keep = linear.to_stored(pruned.keep_OD).cpu()
    if pruned.weight_OD is None:
        tensor = checkpoint.read(stored)
    else:
        tensor = linear.to_stored(pruned.weight_OD).to("cpu", checkpoint.tensors[stored].dtype).contiguous()
    # As integers: pruned weights become +0, never -0, and it is several times faster than masked_fill_.
    tensor.view(INTEGERS[tensor.dtype.itemsize]).mul_(keep)
    block.get_parameter(linear.parameter).data.copy_(tensor)
    records[linear.name] = LinearRecord(
        pruned=keep.numel() - int(keep.count_nonzero()),
        zeros=tensor.numel() - int(tensor.count_nonzero()),
        numel=tensor.numel(),
        rewritten=pruned.weight_OD is not None,
        notes=pruned.notes,
    )
    yield from tensor_chunks(tensor)


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


def require_committed(path: Path, commit: Commit) -> None:
    """Raise RunDirectoryError unless the shard on disk is the one that was committed."""
    found = hash_file(path) if path.exists() else "no file"
    if found != commit.sha256:
        raise RunDirectoryError(
            f"{path} is not the shard that block {commit.block} committed (sha256 {commit.sha256[:12]}…, found "
            f"{found[:12]}): it was changed or removed afterwards. Restore it, or start in a new output directory"
        )
