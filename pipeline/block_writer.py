"""A pruned block as it is stored: its matrices rounded to the stored dtype, put into the block, and written.

What runs on is what was written: a resumed run, which reads the shard back, sees the same bits.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from pipeline.anatomy import Cut
from pipeline.linears import Linear
from pipeline.methods.step import PrunedBlock
from pipeline.records import LinearRecord
from pipeline.shards import OutputTensor, WrittenShard, tensor_chunks, write_shard
from pipeline.skeleton import Skeleton
from pipeline.sparsity import row_slabs

INTEGERS = {2: torch.int16, 4: torch.int32}
"""Integer dtype of the same size as a stored float."""

Records = dict[str, LinearRecord]


def write_block(
    skeleton: Skeleton, index: int, linears: Sequence[Linear], pruned: PrunedBlock, path: Path
) -> tuple[Records, WrittenShard]:
    """Write the block's shard, one tensor in memory at a time, and put what was written into the block."""
    checkpoint = skeleton.checkpoint
    by_parameter = {linear.parameter: linear for linear in linears}
    records: Records = {}
    outputs = []
    for own, stored in skeleton.block_names(index).items():
        linear, entry = by_parameter.get(own), checkpoint.tensors[stored]
        if own in pruned.others:
            chunks = partial(_tuned_chunks, skeleton, index, own, pruned.others[own])
        elif linear is not None and linear.name in pruned.linears:
            chunks = partial(_pruned_chunks, skeleton, index, stored, linear, pruned, records)
        elif pruned.cut is not None and pruned.cut.touches(own):
            chunks = partial(_left_chunks, skeleton, index, own, pruned.cut)
        else:
            chunks = partial(checkpoint.chunks, stored)
        outputs.append(OutputTensor(name=stored, dtype=entry.dtype, shape=skeleton.shape_of(index, own), chunks=chunks))
    return records, write_shard(path, outputs)


def round_block(skeleton: Skeleton, index: int, linears: Sequence[Linear], pruned: PrunedBlock) -> None:
    """Put into the block what another replica of this stage writes."""
    for own, value in pruned.others.items():
        _put_tuned(skeleton, index, own, value)
    names = skeleton.block_names(index)
    for linear in linears:
        if linear.name in pruned.linears:
            _put_pruned(skeleton, index, names[linear.parameter], linear, pruned)


def _tuned_chunks(skeleton: Skeleton, index: int, own: str, value: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tuned parameter that is no matrix, having put it into the block."""
    yield from tensor_chunks(_put_tuned(skeleton, index, own, value))


def _put_tuned(skeleton: Skeleton, index: int, own: str, value: torch.Tensor) -> torch.Tensor:
    """Round a parameter to its stored dtype, put that into the block, and return it, on the CPU."""
    dtype = skeleton.checkpoint.tensors[skeleton.block_names(index)[own]].dtype
    tensor = value.detach().to("cpu", dtype).contiguous()
    skeleton.blocks[index].get_parameter(own).data.copy_(tensor)
    return tensor


def _pruned_chunks(
    skeleton: Skeleton, index: int, stored: str, linear: Linear, block: PrunedBlock, records: Records
) -> Iterator[memoryview]:
    """Yield the bytes of one pruned tensor, having put it into the block and recorded its counts."""
    pruned = block.linears[linear.name]
    tensor = _put_pruned(skeleton, index, stored, linear, block)
    num_kept = int(pruned.keep_OD.count_nonzero())
    records[linear.name] = LinearRecord(
        pruned=pruned.keep_OD.numel() - num_kept,
        zeros=tensor.numel() - int(tensor.count_nonzero()),
        numel=tensor.numel(),
        rewritten=pruned.weight_OD is not None or _is_folded(linear, block.cut),
        notes=pruned.notes,
        sparsity=str(pruned.sparsity),
    )
    yield from tensor_chunks(tensor)


def _is_folded(linear: Linear, cut: Cut | None) -> bool:
    return cut is not None and cut.folds(linear.parameter)


def _left_chunks(skeleton: Skeleton, index: int, own: str, cut: Cut) -> Iterator[memoryview]:
    """Yield the bytes of what is left of a parameter, which is in the block already."""
    yield from tensor_chunks(_as_stored(skeleton, index, own, cut).contiguous())


def _as_stored(skeleton: Skeleton, index: int, own: str, cut: Cut | None) -> torch.Tensor:
    """Return a parameter to the bit in its stored dtype, on the CPU: the block's own memory, where it is so there.

    That is the source's, or what has been left of it; where the compute dtype does not hold every stored value it is
    made from the source again.
    """
    stored = skeleton.block_names(index)[own]
    dtype, tensor = skeleton.checkpoint.tensors[stored].dtype, skeleton.blocks[index].get_parameter(own).data
    if torch.promote_types(dtype, tensor.dtype) == tensor.dtype:
        return tensor.to("cpu", dtype)  # itself, where nothing is to be converted
    source = skeleton.checkpoint.read(stored)
    return source if cut is None else cut.left(own, source)


def _put_pruned(skeleton: Skeleton, index: int, stored: str, linear: Linear, block: PrunedBlock) -> torch.Tensor:
    """Make one pruned tensor in its stored dtype, put it into the block, and return it, on the CPU.

    Weights that were only masked stay as they are to the bit.
    """
    pruned = block.linears[linear.name]
    keep, dtype = linear.to_stored(pruned.keep_OD).cpu(), skeleton.checkpoint.tensors[stored].dtype
    own = skeleton.blocks[index].get_parameter(linear.parameter).data
    if pruned.weight_OD is not None:
        tensor = linear.to_stored(pruned.weight_OD).to("cpu", dtype).contiguous()
    else:
        tensor = _as_stored(skeleton, index, linear.parameter, block.cut).contiguous()
    for rows in row_slabs(*tensor.shape):
        # As integers: pruned weights become +0, never -0, and it is several times faster than masked_fill_.
        tensor[rows].view(INTEGERS[dtype.itemsize]).mul_(keep[rows])
    if tensor is not own:
        own.copy_(tensor)
    return tensor
