"""What a smaller model saves: parameters counted from its files, bytes on disk, and speed beside the dense one.

Both are transformers models in one process and take turns, so that whatever else the machine does slows both; of each
the fastest turn counts. On a CPU it is the process's own time, without what others take.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint import Checkpoint
from pipeline.silencing import attention_numel, writers
from pipeline.skeleton import Skeleton
from pipeline.uneven import load

PROMPT, NEW = 512, 32
"""Tokens read at once, and tokens written one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What is left of a dense model, and how much faster that is."""

    parameters: int
    """Numbers in all its tensors."""

    part_removed: float
    """Of the parameters of the dense model's blocks."""

    part_idle: float
    """The same: still there, in attentions that write zeros alone."""

    num_bytes: int
    """Of its safetensors files."""

    reading: float
    """Tokens a second of a prompt read at once, over the dense model's."""

    writing: float
    """Tokens a second of a text written token by token, over the dense model's."""


@torch.no_grad()
def weigh(dense: Path, smaller: Path, dtype: torch.dtype, device: torch.device, num_turns: int = 5) -> Weight:
    """Count what is in two checkpoints' files, and let both models read and write in turn, batch 1."""
    before, after = count(dense), count(smaller)
    models = [load(path, dtype, device) for path in (dense, smaller)]
    return Weight(
        parameters=after.parameters,
        part_removed=1 - after.in_blocks / before.in_blocks,
        part_idle=after.idle / before.in_blocks,
        num_bytes=sum(file.stat().st_size for file in smaller.glob("*.safetensors")),
        reading=ratio(models, read, num_turns),
        writing=ratio(models, write, num_turns),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameters of a checkpoint."""

    parameters: int
    in_blocks: int
    idle: int
    """In attentions that write zeros alone."""


def count(directory: Path) -> Count:
    """Count a checkpoint's parameters from the headers of its files."""
    with closing(Checkpoint.open(directory)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        blocks = range(skeleton.num_blocks)
        silent = [i for i in blocks if not any(checkpoint.read(name).any() for name in writers(skeleton, i))]
        return Count(
            parameters=checkpoint.numel(), in_blocks=sum(skeleton.block_numel(index) for index in blocks),
            idle=len(silent) * attention_numel(skeleton) if silent else 0,
        )  # fmt: skip


def ratio(models: list[PreTrainedModel], turn: Callable[[PreTrainedModel], None], num_turns: int) -> float:
    """Return how many times as fast the second model is; each has a turn that does not count before the others."""
    fastest = [float("inf")] * len(models)
    now = time.process_time if models[0].device.type == "cpu" else time.perf_counter
    for number in range(num_turns + 1):
        for which, model in enumerate(models):
            began = now()
            turn(model)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            if number:
                fastest[which] = min(fastest[which], now() - began)
    return fastest[0] / fastest[1]


def read(model: PreTrainedModel) -> None:
    """Read a prompt."""
    model(prompt(model, PROMPT), use_cache=False)


def write(model: PreTrainedModel) -> None:
    """Write after a short prompt, each token on its own."""
    model.generate(prompt(model, NEW), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)  # type: ignore[operator]


def prompt(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Return some tokens, int64 [1, length]: speed does not depend on which."""
    return torch.arange(length, device=model.device).remainder(model.config.vocab_size)[None]
