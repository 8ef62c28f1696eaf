"""Perplexity of a checkpoint, streamed block by block: memory is one block and the hidden states of the windows.

The text is tokenised whole and cut into non-overlapping windows of L tokens; the perplexity is
exp(sum of cross-entropies / (windows * (L - 1))).
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from pipeline.activations import Boundary
from pipeline.calibration import load_tokenizer, require_in_vocabulary, require_positions, text_windows
from pipeline.config import EvaluateConfig
from pipeline.errors import CalibrationError, NumericsError
from pipeline.heap import give_back_freed_memory
from pipeline.inputs import embed_tokens, run_dense_block
from pipeline.memory import Memory
from pipeline.progress import Progress, Silent
from pipeline.skeleton import Skeleton
from pipeline.sources import TokensFile, describe, documents, token_ids
from pipeline.stream import Stream

LARGEST_EXPONENT = 709.0
"""`exp` of more overflows a float."""

HEAD_TOKENS = 128
"""Tokens whose logits are made at once: bounds the largest tensor of an evaluation to 128 x vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found, and on what."""

    perplexity: float
    num_windows: int
    sequence_length: int
    text: str
    """The source of the text, in words."""


def load_windows(config: EvaluateConfig, tokenizer_directory: Path) -> torch.Tensor:
    """Return the windows to evaluate on, int64 [W, L]; raises CalibrationError when there are too few."""
    length, source = config.sequence_length, config.source
    if isinstance(source, TokensFile):
        ids = token_ids(source).flatten()
        windows = ids[: len(ids) // length * length].view(-1, length)
    else:
        text = "\n\n".join(documents(source))
        limit = config.windows if config.take == "first" else None
        windows = text_windows(text, load_tokenizer(tokenizer_directory), length, limit)
        give_back_freed_memory()  # the tokenizer's: no plan counts it
    wanted = config.windows or len(windows)
    if len(windows) < wanted or not len(windows):
        raise CalibrationError(
            f"{describe(source)} gives {len(windows)} windows of {length} tokens, but evaluate.windows asks for "
            f"{wanted}; use more text, or fewer or shorter windows"
        )
    return windows[:wanted] if config.take == "first" else windows[-wanted:]


def evaluate(
    skeleton: Skeleton,
    windows_WL: torch.Tensor,
    batch: int,
    progress: Progress,
    task: str,
    between_blocks: Callable[[], None],
    memory: Memory,
) -> float:
    """Return the perplexity of a skeleton's checkpoint on windows_WL (int64: W windows of L tokens).

    `between_blocks` is called after every block, and may raise to end the evaluation.
    """
    require_in_vocabulary(windows_WL, skeleton.vocab_size, "the evaluation text")
    require_positions(windows_WL.shape[1], skeleton.num_positions, "evaluate.sequence_length")
    progress.begin(task, skeleton.num_blocks, 0)
    with closing(embed_tokens(skeleton, windows_WL, batch, memory.store, "evaluated")) as boundary:
        perplexity = _from_block(skeleton, 0, boundary, boundary, windows_WL, batch, progress, between_blocks, memory)
    progress.end()
    return perplexity


def evaluate_from(
    skeleton: Skeleton,
    first: int,
    entering: Boundary,
    windows_WL: torch.Tensor,
    batch: int,
    between_blocks: Callable[[], None],
    memory: Memory,
) -> float:
    """Return the perplexity as `evaluate` does, from the hidden states that enter block `first`; they stay as they are.

    They are those of windows_WL, made by the blocks before it, however that was.
    """
    with closing(memory.store.boundary("evaluated", entering.shape, entering.dtype)) as boundary:
        return _from_block(
            skeleton, first, entering, boundary, windows_WL, batch, Silent(), between_blocks, memory
        )  # fmt: skip


def _from_block(
    skeleton: Skeleton,
    first: int,
    entering: Boundary,
    boundary: Boundary,
    windows_WL: torch.Tensor,
    batch: int,
    progress: Progress,
    between_blocks: Callable[[], None],
    memory: Memory,
) -> float:
    """Run the blocks from `first` on, whose outputs go into `boundary`, and the head."""
    stream = Stream(skeleton, skeleton.checkpoint)
    with memory.weights_of(skeleton) as weights:
        for index in range(first, skeleton.num_blocks):
            progress.phase(index, "evaluate")
            following = index + 1 if memory.ahead and index + 1 < skeleton.num_blocks else None
            source = entering if index == first else boundary
            run_dense_block(stream, weights, source, index, following, batch, into=boundary)
            progress.advance(index, "")
            between_blocks()
    progress.phase(skeleton.num_blocks - 1, "head")
    return _perplexity(stream, boundary, windows_WL)


def _perplexity(stream: Stream, boundary: Boundary, windows_WL: torch.Tensor) -> float:
    """Turn final hidden states into a perplexity, a few tokens at a time."""
    num_windows, length = windows_WL.shape
    total = torch.zeros((), dtype=torch.float64)
    with stream.outside_weights():
        for window, hidden_BTD in boundary.stream(1, stream.device):
            for start in range(0, length - 1, HEAD_TOKENS):
                stop = min(start + HEAD_TOKENS, length - 1)
                logits_TV = stream.logits(hidden_BTD[:, start:stop])[0].float()
                labels_T = windows_WL[window.start, start + 1 : stop + 1].to(logits_TV.device)
                total += cross_entropy(logits_TV, labels_T, reduction="sum").double().cpu()
    mean = total.item() / (num_windows * (length - 1))
    if not mean < LARGEST_EXPONENT:
        raise NumericsError(
            f"the cross-entropy is {mean:g} nats per token, so there is no finite perplexity: logits hold NaN or Inf, "
            "or the model is broken. Compute in float32 (`compute.dtype: float32`), or check the download"
        )
    return math.exp(mean)
