"""A model writes text: tokens drawn one by one from its own distribution.

Every token takes every weight, so the whole model is held for as long as it writes. It is the model's own forward that
runs, with the cache that the model makes for itself: sliding windows and positions are as its authors meant them.

A sequence begins with the start token, or with tokens that are given. Where the model ends its text, the sequence goes
on with a new document: the start token again, then what the model writes after it. Documents one after another are what
it was trained on; to forbid the end instead would have it go on where it has nothing left to say.

Shapes: B sequences at a time, T tokens each, V tokens in the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.calibration import require_in_vocabulary
from pipeline.devices import empty_cache
from pipeline.errors import CalibrationError, NumericsError
from pipeline.heap import give_back_freed_memory
from pipeline.numerics import all_finite
from pipeline.own_text import SelfOptions
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The tokens that begin and end a document."""

    start: int
    ends: tuple[int, ...]


def marks_of(skeleton: Skeleton) -> Marks:
    """Return the marks that a model's config.json names: documents begin with BOS, else with EOS.

    Raises CalibrationError where it names neither, or one outside the vocabulary.
    """
    named = skeleton.model.config.get_text_config().to_dict()
    begin, end = named.get("bos_token_id"), named.get("eos_token_id")
    ends = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    if begin is None and not ends:
        raise CalibrationError(
            "calibration.source: self needs a token to begin a text with, and config.json names neither bos_token_id "
            "nor eos_token_id; name one there, or use another source: {text: FILE}"
        )
    marks = Marks(start=ends[0] if begin is None else begin, ends=ends)
    require_in_vocabulary(torch.tensor([marks.start, *ends]), skeleton.vocab_size, "config.json")
    return marks


def sample_sequences(
    skeleton: Skeleton,
    num_sequences: int,
    num_tokens: int,
    options: SelfOptions,
    seed: int,
    after_tokens: Callable[[int], None],
    prompts_NP: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what the model writes, int64 [num_sequences, num_tokens] on the CPU.

    prompts_NP: what each row begins with, P < num_tokens; the start token where it is absent.

    The same seed gives the same tokens, on the same machine with the same batch: rounding differs between others.
    `after_tokens` is told how many tokens have come, after each position of a batch; it may raise to end the writing.
    Raises NumericsError where logits are not finite.
    """
    marks, generator = marks_of(skeleton), torch.Generator().manual_seed(seed)
    if prompts_NP is None:
        prompts_NP = torch.full((num_sequences, 1), marks.start)
    with _whole_model(skeleton):
        written = [
            _sample_batch(skeleton, marks, prompts_BP, num_tokens, options, generator, after_tokens)
            for prompts_BP in torch.split(prompts_NP, options.batch)
        ]
    return torch.cat(written)


@torch.no_grad()
def _sample_batch(
    skeleton: Skeleton,
    marks: Marks,
    prompts_BP: torch.Tensor,
    num_tokens: int,
    options: SelfOptions,
    generator: torch.Generator,
    after_tokens: Callable[[int], None],
) -> torch.Tensor:
    num_sequences, num_given = prompts_BP.shape
    tokens_BT = torch.full((num_sequences, num_tokens), marks.start)
    tokens_BT[:, :num_given] = prompts_BP
    to_be_followed = torch.tensor([end for end in marks.ends if end != marks.start], dtype=torch.int64)
    cache: Any = None  # the first forward makes one of the model's own kind
    after_tokens(num_sequences * num_given)
    num_read = 0
    for position in range(num_given, num_tokens):
        unread_BN, num_read = tokens_BT[:, num_read:position], position
        last_B1 = unread_BN[:, -1:]
        output = skeleton.model(input_ids=unread_BN.to(skeleton.device), past_key_values=cache, use_cache=True)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].cpu()
        if not all_finite(logits_BV):
            raise NumericsError(
                f"the model's logits hold NaN or Inf at token {position} of the calibration text that it writes; "
                "compute in float32 (`compute.dtype: float32`), check the download, or use another source: {text: FILE}"
            )
        drawn_B = draw(logits_BV, options, generator)
        tokens_BT[:, position] = drawn_B.where(~torch.isin(last_B1[:, 0], to_be_followed), marks.start)
        after_tokens(num_sequences)
    return tokens_BT


def draw(logits_BV: torch.Tensor, options: SelfOptions, generator: torch.Generator) -> torch.Tensor:
    """Return one token for each row of logits, int64 [B], all on the CPU; in float64.

    Of the `top_k` likeliest, and of those as likely as the last of them, where it is set.
    """
    scaled_BV = logits_BV.double() / options.temperature
    if options.top_k is not None and options.top_k < scaled_BV.shape[1]:
        least_B1 = scaled_BV.topk(options.top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    cumulative_BV = scaled_BV.softmax(-1).cumsum(-1)
    # Below the last sum, for a random number is below 1; and `right` passes over what has no probability.
    at_B1 = torch.rand(len(logits_BV), 1, dtype=torch.float64, generator=generator) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0]


@contextmanager
def _whole_model(skeleton: Skeleton) -> Iterator[None]:
    """Hold all weights where blocks run; those outside the blocks come as the first forward reaches them."""
    try:
        with Stream(skeleton, skeleton.checkpoint).outside_weights():
            for index in range(skeleton.num_blocks):
                skeleton.load_block(index, skeleton.checkpoint)
            yield
    finally:
        for index in range(skeleton.num_blocks):
            skeleton.release_block(index)
        give_back_freed_memory()
        empty_cache(skeleton.device)
