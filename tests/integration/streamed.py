"""Logits of a checkpoint as the pipeline's own stream makes them, block by block, with blocks altered on the way."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint import Checkpoint
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream

Alter = Callable[[int, nn.Module, Mapping[str, str]], None]
"""Changes a block before it runs: its index, itself, and its parameters' names in the checkpoint."""


def as_it_is(index: int, block: nn.Module, names: Mapping[str, str]) -> None:
    """Change nothing."""


@torch.no_grad()
def streamed_logits(
    directory: Path, tokens: torch.Tensor, alter: Alter = as_it_is, blocks: Sequence[int] | None = None
) -> torch.Tensor:
    """Return the logits [B, T, V] in float32, of all blocks or some."""
    with closing(Checkpoint.open(directory)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        stream = Stream(skeleton, checkpoint)
        with stream.outside_weights():
            hidden = stream.embed(tokens)
        for index in range(skeleton.num_blocks) if blocks is None else blocks:
            alter(index, skeleton.load_block(index, checkpoint), skeleton.block_names(index))
            hidden = stream.run_block(index, hidden)
            skeleton.release_block(index)
        with stream.outside_weights():
            return stream.logits(hidden)
