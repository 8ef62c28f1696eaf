"""Re-read a pruned model from disk and hold it against its source and its ledger.

Names, shapes, dtypes; every unpruned tensor byte for byte; every pruned tensor's zero count, pattern and, where
it was only masked, its kept weights; the hash of every shard. Nothing is taken from memory of the run.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch

from pipeline.allocation import STEPS
from pipeline.assemble import OUTSIDE
from pipeline.attention import HeadLayout
from pipeline.block_widths import Width, each_width, width_at
from pipeline.checkpoint import INDEX_NAME, Checkpoint
from pipeline.errors import VerificationError
from pipeline.head_count import heads_left
from pipeline.ledger import Ledger
from pipeline.linears import find_linears
from pipeline.methods.step import Shapes, Step, num_weights
from pipeline.narrower import narrowed
from pipeline.numerics import all_finite
from pipeline.progress import Progress
from pipeline.recipe import Recipe, parse_recipe
from pipeline.records import Commit, LinearRecord
from pipeline.remains import heads_left_by, remains_of
from pipeline.shape import Shape
from pipeline.shards import hash_file
from pipeline.silencing import num_silenced
from pipeline.skeleton import Skeleton
from pipeline.sparsity import SemiStructured, Sparsity, holds, parse_sparsity
from pipeline.splits import splits_of
from pipeline.width import width_left


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked."""

    tensors: int
    identical_tensors: int
    """Tensors equal to their source byte for byte."""

    pruned_tensors: int
    pruned_weights: int
    prunable_weights: int
    bytes_read: int
    parameters: int
    """Counted from the files."""

    source_parameters: int

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def verify(run_directory: Path, source: Path, progress: Progress) -> Verification:
    """Check a finished run against its source; raises VerificationError that lists every discrepancy."""
    ledger = Ledger.read(run_directory)
    directory = run_directory / "model"
    if not (directory / INDEX_NAME).exists():
        raise VerificationError(
            f"the run in {run_directory} is not finished ({len(ledger.commits)} blocks are committed), so there is no "
            f"model to verify yet; go on with: secateur run {run_directory}"
        )
    with closing(Checkpoint.open(directory)) as output, closing(Checkpoint.open(source)) as original:
        dense = Skeleton(original, torch.device("cpu"), torch.float32)
        skeleton = _left(dense, ledger)
        problems = [*_names_and_shapes(output, skeleton, ledger), *_smaller(ledger, dense, skeleton, output)]
        if not problems:
            problems = [
                *_hashes(ledger, output),
                *_whole(ledger, skeleton),
                *_contents(ledger, skeleton, output, progress),
            ]
        if problems:
            listed = "\n  ".join(problems[:20])
            raise VerificationError(
                f"{directory} is not what its ledger says, {len(problems)} discrepancies:\n  {listed}\n"
                "Do not use it; prune again in a new output directory"
            )
        records = [record for commit in ledger.commits.values() for record in commit.linears.values()]
        changed = skeleton.checkpoint.tensors.keys() - skeleton.checkpoint.shard_of.keys()  # zeros
        for index, commit in ledger.commits.items():
            changed |= {skeleton.block_names(index)[own] for own in _changed(skeleton, commit)}
        return Verification(
            tensors=len(output.tensors),
            identical_tensors=len(output.tensors) - len(changed),
            pruned_tensors=len(records),
            pruned_weights=sum(record.pruned for record in records),
            prunable_weights=sum(record.numel for record in records),
            bytes_read=output.total_bytes() + skeleton.checkpoint.total_bytes(),
            parameters=output.numel(),
            source_parameters=original.numel(),
        )


def _left(dense: Skeleton, ledger: Ledger) -> Skeleton:
    """Return the part of the source that the run has kept: all of it, or some of its blocks."""
    shape = ledger.header.config.get("shape")
    return dense if shape is None else narrowed(dense, Shape.from_data(shape))


def _smaller(ledger: Ledger, dense: Skeleton, left: Skeleton, output: Checkpoint) -> Iterator[str]:
    """Hold what is gone for good against what was asked, and the config against the blocks that are left."""
    recipe, target, _ = _asked(ledger)
    gone = dense.num_blocks - left.num_blocks
    wanted = [0] if recipe.shape is None else splits_of(recipe.shape, dense, recipe.part_removed(target))
    if gone not in wanted:
        yield f"{gone} of {dense.num_blocks} blocks are gone, and {' or '.join(map(str, wanted))} were to go"
    shape = ledger.header.config.get("shape")
    silent = () if shape is None else Shape.from_data(shape).silent
    asked_silent = 0 if recipe.shape is None else num_silenced(recipe.shape, dense, recipe.part_removed(target))
    if len(silent) != asked_silent:
        yield f"{len(silent)} attentions are silenced, and {asked_silent} were to be"
    if output.settings() != left.checkpoint.settings():
        yield "config.json is not the source's with the blocks taken out that are gone, and its neurons and heads"
    if recipe.shape is not None:
        asked = width_left(recipe.shape, dense, gone, recipe.part_removed(target))
        chosen = Shape.from_data(ledger.header.config["shape"]).width
        yield from _heads(ledger, heads_left(recipe.shape, dense), dense)
        yield from _widths(ledger, asked, chosen if recipe.shape.widths_differ else asked, left.num_blocks)


def _widths(ledger: Ledger, asked: Width | None, chosen: Width | None, num_blocks: int) -> Iterator[str]:
    """Hold the neurons of each block against what was chosen for it, and what was chosen against what was asked."""
    wanted, stated = (sum(each_width(width or 0, num_blocks)) for width in (asked, chosen))
    if stated != wanted:
        yield f"all blocks were to keep {stated:,} neurons together, and {wanted:,} were asked for"
    for index, commit in ledger.commits.items():
        found = None if commit.cut is None else commit.cut.width
        expected = None if chosen is None else width_at(chosen, index)
        if found != expected:
            yield f"block {index} keeps {found or 'all'} neurons, and {expected or 'all'} were to stay"


def _heads(ledger: Ledger, asked: HeadLayout | None, dense: Skeleton) -> Iterator[str]:
    """Hold the heads of each block against what was asked."""
    for index, commit in ledger.commits.items():
        found = heads_left_by(dense, commit)
        if found != asked:
            yield f"block {index} keeps {found or 'all heads'}, and {asked or 'all'} were to stay"


def _asked(ledger: Ledger) -> tuple[Recipe, Sparsity, bool]:
    """Return the recipe, what it was asked for, and whether that was spread by outliers."""
    prune = ledger.header.config["prune"]
    assert isinstance(prune, dict)
    asked = parse_sparsity(prune["sparsity"])  # type: ignore[arg-type]  # validated before it was written
    recipe = parse_recipe(prune["recipe"], None)  # type: ignore[arg-type]  # likewise
    return recipe, asked, "allocation" in prune


def _names_and_shapes(output: Checkpoint, skeleton: Skeleton, ledger: Ledger) -> list[str]:
    original, narrow = skeleton.checkpoint, _narrow(skeleton, ledger)
    problems = [f"tensor {name} of the source is missing" for name in original.tensors if name not in output.tensors]
    problems += [f"tensor {name} is not in the source" for name in output.tensors if name not in original.tensors]
    for name in output.tensors.keys() & original.tensors.keys():
        found, wanted = output.tensors[name], original.tensors[name]
        shape = narrow.get(name, wanted.shape)
        if (found.shape, found.dtype) != (shape, wanted.dtype):
            left = "its source" if name not in narrow else "what is left of its source"
            problems.append(f"{name} is {found.dtype} {found.shape}, {left} {wanted.dtype} {shape}")
    return problems


def _narrow(skeleton: Skeleton, ledger: Ledger) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that have lost neurons or heads, by their names."""
    return {
        skeleton.block_names(index)[own]: shape
        for index, commit in ledger.commits.items()
        for own, shape in remains_of(skeleton, commit).shapes.items()
    }


def _changed(skeleton: Skeleton, commit: Commit) -> set[str]:
    """Return the parameters of a block that are not what they are in the source, by their names within it."""
    masked = {n.parameter for n in find_linears(skeleton.blocks[commit.block]) if n.name in commit.linears}
    return {*masked, *commit.tuned, *remains_of(skeleton, commit).shapes}


def _hashes(ledger: Ledger, output: Checkpoint) -> Iterator[str]:
    """Hold the files that the model is read from against the ledger's receipts: no others, and all as written."""
    receipts = {commit.file: commit.sha256 for commit in ledger.commits.values()}
    outside = ledger.notes.get(OUTSIDE)
    if isinstance(outside, dict):
        receipts[str(outside["file"])] = str(outside["sha256"])
    for file in sorted(set(output.shard_of.values()) - receipts.keys()):
        yield f"{file} is what the model is read from, and the ledger knows no such file"
    for file, sha256 in receipts.items():
        found = hash_file(output.directory / file)
        if found != sha256:
            yield f"{file} has sha256 {found[:12]}…, the ledger says {sha256[:12]}…"


def _whole(ledger: Ledger, skeleton: Skeleton) -> Iterator[str]:
    """Hold all that was pruned against the sparsity that was asked, however it was spread over the blocks."""
    recipe, asked, by_outliers = _asked(ledger)
    if not recipe.steps:
        return
    skip: Any = ledger.header.config["prune"]["skip"]  # type: ignore[index,call-overload]  # as `header_of` has it
    for index, commit in ledger.commits.items():
        if commit.linears.keys() != (wanted := {n.name for n in find_linears(skeleton.blocks[index], skip)}):
            odd = ", ".join(sorted(wanted ^ commit.linears.keys()))
            yield f"block {index}: {odd} pruned though skipped, or not pruned though asked for"
    blocks = [_shapes(skeleton, index, commit) for index, commit in ledger.commits.items()]
    num_pruned = sum(record.pruned for commit in ledger.commits.values() for record in commit.linears.values())
    least, most = num_pruned_within(asked, recipe.steps[0], blocks, by_outliers=by_outliers)
    if not least <= num_pruned <= most:
        yield (
            f"{num_pruned:,} of {sum(map(num_weights, blocks)):,} weights were pruned, by the ledger; "
            f"asked was {asked}, and rounding explains no fewer than {least:,} and no more than {most:,}"
        )


def num_pruned_within(
    asked: Sparsity, step: Step, blocks: Sequence[Shapes], *, by_outliers: bool = False
) -> tuple[int, int]:
    """Return the fewest and the most weights of a model that are pruned where all is well.

    step: what chose the masks, whose rounding adds up over the blocks. An allocation by outliers is rounded for all of
    them together: fractions to millionths, patterns by less than a weight of every group of the largest block.
    """
    sizes = [num_weights(shapes) for shapes in blocks]
    wanted, by_method = asked.fraction * sum(sizes), sum(step.rounding(asked, shapes) for shapes in blocks)
    if isinstance(asked, SemiStructured):
        allocated = max(sizes) // asked.group if by_outliers else 0
        return ceil(wanted), floor(wanted) + by_method + allocated
    allocated = sum(sizes) // STEPS + 1 if by_outliers else 0
    return ceil(wanted) - by_method - allocated, floor(wanted) + allocated


def _shapes(skeleton: Skeleton, index: int, commit: Commit) -> Shapes:
    """Return the shapes of the linears that were pruned of a block, without what was taken out of it before."""
    block, remains = skeleton.blocks[index], remains_of(skeleton, commit)
    left = {n.name: n.to_rows(remains.left(n.parameter, n.to_stored(n.weight(block)))) for n in find_linears(block)}
    return {name: (left[name].shape[0], left[name].shape[1]) for name in commit.linears}


def _contents(ledger: Ledger, skeleton: Skeleton, output: Checkpoint, progress: Progress) -> Iterator[str]:
    """Compare tensor by tensor, one of each model in memory at a time."""
    progress.begin("verify", skeleton.num_blocks, 0)
    for name in skeleton.outside_names():
        yield from _identical(skeleton.checkpoint, output, name)
    for index in range(skeleton.num_blocks):
        progress.phase(index, "verify")
        if index not in ledger.commits:
            yield f"block {index} has no commit in the ledger"
            continue
        yield from _block(ledger.commits[index], skeleton, index, output)
        progress.advance(index, "")
    progress.end()


def _block(commit: Commit, skeleton: Skeleton, index: int, output: Checkpoint) -> Iterator[str]:
    linears = {linear.parameter: linear for linear in find_linears(skeleton.blocks[index])}
    remains, changed = remains_of(skeleton, commit), _changed(skeleton, commit)
    for own, name in skeleton.block_names(index).items():
        linear = linears.get(own)
        if own in commit.tuned:
            if not all_finite(output.read(name)):
                yield f"{name} holds NaN or Inf"
            continue
        if own not in changed:
            yield from _identical(skeleton.checkpoint, output, name)
            continue
        source, found = remains.left(own, skeleton.checkpoint.read(name)), output.read(name)
        if linear is not None and linear.name in commit.linears:
            yield from _pruned(name, linear.to_rows(found), linear.to_rows(source), commit.linears[linear.name])
        elif not all_finite(found):
            yield f"{name} holds NaN or Inf"
        elif own not in remains.folded and not torch.equal(found, source):
            yield f"{name} was only to lose {remains.lost(own)}, but what is left of it differs from the source"


def _pruned(name: str, pruned_OD: torch.Tensor, source_OD: torch.Tensor, record: LinearRecord) -> Iterator[str]:
    kept_OD, sparsity = pruned_OD != 0, parse_sparsity(record.sparsity)
    zeros = pruned_OD.numel() - int(kept_OD.count_nonzero())
    if zeros != record.zeros or zeros < record.pruned:
        yield f"{name} has {zeros} zeros, the ledger says {record.zeros} ({record.pruned} pruned)"
    if not all_finite(pruned_OD):
        yield f"{name} holds NaN or Inf"
    if isinstance(sparsity, SemiStructured) and not holds(kept_OD, sparsity):
        yield f"{name} breaks the {sparsity} pattern"
    if not record.rewritten and not torch.equal(pruned_OD, source_OD.masked_fill(~kept_OD, 0)):
        yield f"{name} was only to be masked, but kept weights differ from the source"


def _identical(original: Checkpoint, output: Checkpoint, name: str) -> Iterator[str]:
    pairs = zip(original.chunks(name), output.chunks(name), strict=True)
    if not all(left == right for left, right in pairs):
        yield f"{name} was not pruned, but differs from its source"
