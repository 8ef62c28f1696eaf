"""Where the hidden states come from that a stage starts on: the embedding, and dense blocks run over them."""

from collections.abc import Sequence

import torch

from pipeline.activations import Boundary, Outlet, Store, batches, require_finite
from pipeline.devices import free_bytes
from pipeline.memory import Memory
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
from pipeline.weights import BlockWeights

STREAMED_ROUNDS = 4
"""How often a stage reads its weights for the dense pass when it cannot hold all of them: once a round."""


@torch.no_grad()
def embed_tokens(skeleton: Skeleton, tokens_NT: torch.Tensor, batch: int, store: Store, name: str) -> Boundary:
    """Return boundary 0, a new one of the store: the sequences as they enter the first block."""
    stream = Stream(skeleton, skeleton.checkpoint)
    boundary = store.boundary(name, (len(tokens_NT), tokens_NT.shape[1], stream.num_features), skeleton.dtype)
    with stream.outside_weights():
        for sequences in boundary.batches(batch):
            boundary.write(sequences, stream.embed(tokens_NT[sequences]), "the embedding")
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
    stream: Stream, weights: BlockWeights, boundary: Boundary, index: int, following: int | None, batch: int
) -> None:
    """Advance a boundary over one block as its checkpoint has it, while the following one is read, if any."""
    weights.load(index)
    if following is not None:
        weights.expect(following)
    for sequences, hidden_BTD in boundary.stream(batch, stream.device):
        boundary.write(sequences, stream.run_block(index, hidden_BTD), f"dense block {index}")
    weights.drop(index)


@torch.no_grad()
def pass_dense_stream(skeleton: Skeleton, boundary: Boundary, blocks: range, batch: int, outlet: Outlet) -> None:
    """Run the dense blocks of a stage on its input, batch by batch, and hand the outputs on; the input stays.

    The weights of all its blocks are held meanwhile, where they fit, so that a batch goes through all of them as
    soon as it has arrived. Where they do not, the sequences go in rounds, each of which reads the weights anew.
    """
    stream = Stream(skeleton, skeleton.checkpoint)
    resident = can_hold(skeleton, blocks)
    keep_on = skeleton.device if resident else torch.device("cpu")
    num_rounds = 1 if resident else STREAMED_ROUNDS
    size = batch if resident else -(-boundary.num_sequences // (num_rounds * batch)) * batch
    for sequences in batches(boundary.num_sequences, size):
        parts = _parts(sequences, batch)
        for index in blocks if resident else blocks[:1]:
            _load(skeleton, index)  # before waiting for what arrives: all stages read at once
        hidden = [boundary.read(part, keep_on) for part in parts]
        for index in blocks:
            _load(skeleton, index)
            for i, hidden_BTD in enumerate(hidden):
                hidden[i] = stream.run_block(index, hidden_BTD.to(skeleton.device)).to(keep_on)
            if not resident:
                skeleton.release_block(index)
        for part, hidden_BTD in zip(parts, hidden, strict=True):
            require_finite(hidden_BTD, f"dense block {blocks[-1]}")
            outlet.send("dense", part, hidden_BTD)
    if resident:
        for index in blocks:
            skeleton.release_block(index)


def can_hold(skeleton: Skeleton, blocks: Sequence[int]) -> bool:
    """Tell whether the weights of these blocks take at most half of the memory that is free where they run.

    On a CPU an eighth: other workers on this machine ask the same.
    """
    numel = sum(skeleton.block_numel(index) for index in blocks)
    share = 8 if skeleton.device.type == "cpu" else 2
    return share * numel * skeleton.dtype.itemsize <= free_bytes(skeleton.device)


def _parts(sequences: slice, batch: int) -> list[slice]:
    return [
        slice(sequences.start + part.start, sequences.start + part.stop)
        for part in batches(sequences.stop - sequences.start, batch)
    ]


def _load(skeleton: Skeleton, index: int) -> None:
    """Read a block's weights, unless they are there."""
    if any(parameter.is_meta for parameter in skeleton.blocks[index].parameters()):
        skeleton.load_block(index, skeleton.checkpoint)
