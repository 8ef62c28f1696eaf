"""Where the hidden states come from that a stage starts on: the embedding, and dense blocks run over them."""

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod

import torch

from pipeline.activations import Boundary, Outlet, Store, batches, require_finite
from pipeline.budget import Budget
from pipeline.devices import free_bytes
from pipeline.memory import Memory
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
from pipeline.weights import BlockWeights

STREAMED_ROUNDS = 4
"""How often a stage reads its weights for the dense pass when it cannot hold all of them, at least: once a round."""


@torch.no_grad()
def embed_tokens(skeleton: Skeleton, tokens_NT: torch.Tensor, batch: int, store: Store, name: str) -> Boundary:
    """Return boundary 0, a new one of the store: the sequences as they enter the first block."""
    stream = Stream(skeleton, skeleton.checkpoint)
    shape = (len(tokens_NT), tokens_NT.shape[1], stream.num_features)
    with ExitStack() as on_error:
        boundary = on_error.enter_context(store.boundary(name, shape, skeleton.dtype))
        with stream.outside_weights():
            for sequences in boundary.batches(batch):
                boundary.write(sequences, stream.embed(tokens_NT[sequences]), "the embedding")
        on_error.pop_all()
    return boundary


@torch.no_grad()
def run_dense_blocks(skeleton: Skeleton, boundary: Boundary, blocks: range, batch: int, memory: Memory) -> None:
    """Advance a boundary over dense blocks, one in memory at a time, and where it fits the next one read ahead."""
    stream = Stream(skeleton, skeleton.checkpoint)
    with memory.weights_of(skeleton) as weights:
        for index in blocks:
            following = index + 1 if memory.ahead and index != blocks[-1] else None
            run_dense_block(stream, weights, boundary, index, following, batch)


@torch.no_grad()
def run_dense_block(
    stream: Stream,
    weights: BlockWeights,
    boundary: Boundary,
    index: int,
    following: int | None,
    batch: int,
    into: Boundary | None = None,
) -> None:
    """Advance a boundary over one block as its checkpoint has it, while the following one is read, if any.

    into: where the outputs go, and the boundary stays as it is; by default they take its place.
    """
    weights.load(index)
    if following is not None:
        weights.expect(following)
    leaving = boundary if into is None else into
    for sequences, hidden_BTD in boundary.stream(batch, stream.device):
        leaving.write(sequences, stream.run_block(index, hidden_BTD), f"dense block {index}")
    weights.drop(index)


@torch.no_grad()
def pass_dense_stream(
    skeleton: Skeleton, boundary: Boundary, blocks: range, batch: int, outlet: Outlet, memory: Memory
) -> None:
    """Run the dense blocks of a stage on its input, batch by batch, and hand the outputs on; the input stays.

    The weights of all its blocks are held meanwhile, where they fit, so that a batch goes through all of them as
    soon as it has arrived. Where they do not, the sequences go in rounds, each of which reads the weights anew.
    """
    stream = Stream(skeleton, skeleton.checkpoint)
    resident = can_hold(skeleton, blocks, memory.budget)
    keep_on = skeleton.device if resident else torch.device("cpu")
    size = batch if resident else _round_size(boundary, batch, memory.budget)
    with memory.weights_of(skeleton) as weights:
        for sequences in batches(boundary.num_sequences, size):
            for index in blocks if resident else blocks[:1]:
                _load(skeleton, weights, index)  # before waiting for what arrives: all stages read at once
            num_bytes = 0 if resident else (sequences.stop - sequences.start) * _sequence_bytes(boundary)
            with memory.budget.take("host", num_bytes, "hidden states passing through"):
                parts = _parts(sequences, batch)
                hidden = [boundary.read(part, keep_on) for part in parts]
                for index in blocks:
                    _load(skeleton, weights, index)
                    for i, hidden_BTD in enumerate(hidden):
                        hidden[i] = stream.run_block(index, hidden_BTD.to(skeleton.device)).to(keep_on)
                    if not resident:
                        weights.drop(index)
                for part, hidden_BTD in zip(parts, hidden, strict=True):
                    require_finite(hidden_BTD, f"dense block {blocks[-1]}")
                    outlet.send("dense", part, hidden_BTD)
        for index in blocks:
            weights.drop(index)


def can_hold(skeleton: Skeleton, blocks: Sequence[int], budget: Budget) -> bool:
    """Tell whether the weights of these blocks take at most half of the memory that is free where they run.

    On a CPU an eighth: other workers on this machine ask the same. Of what a budget leaves, which is this worker's
    own, half in either case.
    """
    num_bytes = sum(skeleton.block_numel(index) for index in blocks) * skeleton.dtype.itemsize
    share = 8 if skeleton.device.type == "cpu" else 2
    left = budget.free("device")
    return share * num_bytes <= free_bytes(skeleton.device) and (left is None or 2 * num_bytes <= left)


def _round_size(boundary: Boundary, batch: int, budget: Budget) -> int:
    """Return how many sequences go through all blocks before the next ones do: whole batches, a quarter of them all.

    Fewer where they would take more than half of what the budget leaves.
    """
    num_batches = -(-boundary.num_sequences // (STREAMED_ROUNDS * batch))
    left = budget.free("host")
    if left is not None:
        num_batches = min(num_batches, left // 2 // (batch * _sequence_bytes(boundary)))
    return max(1, num_batches) * batch


def _sequence_bytes(boundary: Boundary) -> int:
    return prod(boundary.shape[1:]) * boundary.dtype.itemsize


def _parts(sequences: slice, batch: int) -> list[slice]:
    return [
        slice(sequences.start + part.start, sequences.start + part.stop)
        for part in batches(sequences.stop - sequences.start, batch)
    ]


def _load(skeleton: Skeleton, weights: BlockWeights, index: int) -> None:
    """Read a block's weights, unless they are there."""
    if any(parameter.is_meta for parameter in skeleton.blocks[index].parameters()):
        weights.load(index)
