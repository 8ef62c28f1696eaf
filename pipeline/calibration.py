"""Calibration data: text or ready tokens become N sequences of T token ids, hashed, the same on every run.

Two ways to take sequences from text:

- `first`: the documents, joined by blank lines, are tokenised whole and cut into consecutive sequences;
- `random`: of a single text, windows at random places that do not overlap; of rows, the C4 protocol of the
  pruning papers: documents in random order, each that is longer than a sequence gives one random window.

No chat template and no special tokens beyond the tokenizer's own. Shapes: N sequences, T tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import CalibrationError
from pipeline.heap import give_back_freed_memory
from pipeline.own_text import CalibrationSourceField, WrittenByModel
from pipeline.sources import (
    Hub,
    TextFile,
    TextSource,
    TokensFile,
    describe,
    documents,
    token_ids,
)

# `first` reads this many tokens more than it cuts: what a longer text would tokenise otherwise lies in there.
MARGIN_TOKENS = 256
# English text has about four characters a token; only a first guess of how much to read.
CHARACTERS_PER_TOKEN = 4
# Documents held to shuffle a stream: memory stays bounded even when each is a book.
SHUFFLE_DOCUMENTS = 1000
# `random` gives up after this many documents: a stream of short ones would otherwise be read for days.
MOST_DOCUMENTS = 1_000_000


class CalibrationConfig(BaseModel):
    """The `calibration` section of a run's config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: CalibrationSourceField = "embedded"
    """Where the text, or the tokens, come from."""
    sequences: int = Field(default=128, ge=1)
    """How many sequences."""
    tokens: int = Field(default=512, ge=2)
    """Tokens in each sequence; 128 x 512 is what the embedded text can give."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of `sample: random`, and of what `self` writes."""
    sample: Literal["auto", "first", "random"] = "auto"
    """Which sequences of the source: the first, or random ones; auto is random for the hub, else first. `self` has no
    others than it writes."""

    @model_validator(mode="after")
    def _the_model_has_something_to_write(self) -> Self:
        own = self.source.self if isinstance(self.source, WrittenByModel) else None
        if own is not None and own.given is not None and (own.given >= self.sequences or own.prompt >= self.tokens):
            raise ValueError(
                f"{own.given} sequences are given and the model goes on from {own.prompt} tokens, which leaves it "
                f"nothing to write of {self.sequences} sequences x {self.tokens} tokens; raise those, or lower "
                "source.self.given and prompt"
            )
        return self

    @property
    def draws_randomly(self) -> bool:
        """Whether the seed matters, `auto` resolved."""
        return self.sample == "random" or (self.sample == "auto" and isinstance(self.source, Hub))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """The sequences a run is calibrated on, and their fingerprint."""

    tokens_NT: torch.Tensor
    """Token ids, int64 [N, T] on the CPU, contiguous."""
    sha256: str
    """Hex digest of the shape and of the ids as little-endian int64."""
    description: str
    """One line for logs and reports: how many, how chosen, from where."""


def load_calibration(config: CalibrationConfig, tokenizer_directory: Path, vocab_size: int) -> CalibrationSet:
    """The calibration set a config asks for; the same config and the same data give the same set.

    What the model is to write itself is not for here, where there is no model: see `self_calibration`.
    The tokenizer is not touched when the source is tokens. Raises CalibrationError when the source or the
    tokenizer cannot be read, when there is too little, or when an id lies outside `0 .. vocab_size - 1`.
    """
    assert not isinstance(config.source, WrittenByModel)
    if isinstance(config.source, TokensFile):
        tokens_NT = _stored_sequences(config, config.source)
    else:
        tokens_NT = _text_sequences(config, config.source, load_tokenizer(tokenizer_directory))
        give_back_freed_memory()  # the tokenizer's, which would count in the plan's baseline
    tokens_NT = tokens_NT.contiguous()
    require_in_vocabulary(tokens_NT, vocab_size, describe(config.source))
    return CalibrationSet(tokens_NT=tokens_NT, sha256=digest(tokens_NT), description=_description(config))


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None) -> torch.Tensor:
    """The text, tokenised whole, cut from its start into windows that do not overlap: int64 [W, length].

    W is as many as fit, at most `limit`; what is left over at the end is dropped. Raises CalibrationError
    when not one window fits.
    """
    ids = _tokenise(text, tokenizer) if limit is None else _first_tokens(text, tokenizer, limit * length)
    if len(ids) < length:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, and one window needs {length}; use more text or shorter windows"
        )
    return _cut(ids, length)[:limit]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; runs no code from it and asks no network.

    Raises CalibrationError when the directory holds none.
    """
    try:
        if not directory.is_dir():
            raise FileNotFoundError("there is no such directory")
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers lets many classes through, by file and by tokenizer
        raise CalibrationError(
            f"no tokenizer can be loaded from {directory}: {error}; put the model's tokenizer files there, "
            "or use a source of ready tokens: {tokens: FILE}"
        ) from error


def require_in_vocabulary(tokens: torch.Tensor, vocab_size: int, origin: str) -> None:
    """Raise CalibrationError when an id lies outside the model's embedding: the tokenizer is another's."""
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"token id {low if low < 0 else high} from {origin} is outside the model's vocabulary "
            f"(0..{vocab_size - 1}); the tokenizer, or the token file, belongs to another model"
        )


def require_positions(num_tokens: int, num_positions: int | None, setting: str) -> None:
    """Raise CalibrationError when sequences are longer than the model has positions (None: without a limit)."""
    if num_positions is not None and num_tokens > num_positions:
        raise CalibrationError(
            f"{setting} is {num_tokens}, but the model has {num_positions} positions (max_position_embeddings); ask "
            "for shorter sequences"
        )


def digest(tokens_NT: torch.Tensor) -> str:
    """SHA-256, in hex, of the shape and of the ids as little-endian int64."""
    sha = hashlib.sha256(repr(tuple(tokens_NT.shape)).encode())
    sha.update(tokens_NT.numpy().astype("<i8").tobytes())
    return sha.hexdigest()


def _description(config: CalibrationConfig) -> str:
    how = f"random (seed {config.seed})" if config.draws_randomly else "first"
    return f"{how} {config.sequences} sequences x {config.tokens} tokens of {describe(config.source)}"


def _generator(config: CalibrationConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int64 [num_tokens]; `verbose=False`, for a text longer than the model's context is meant here."""
    encoded = tokenizer(text, verbose=False, return_attention_mask=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _cut(ids: torch.Tensor, length: int) -> torch.Tensor:
    """[num_tokens] -> [num_tokens // length, length], from the start."""
    num_windows = len(ids) // length
    return ids[: num_windows * length].view(num_windows, length)


def _text_sequences(config: CalibrationConfig, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    texts = documents(source)
    if isinstance(source, str | TextFile) and config.draws_randomly:
        ids = _tokenise(next(texts), tokenizer)
    elif isinstance(source, str | TextFile):
        ids = _first_tokens(next(texts), tokenizer, config.sequences * config.tokens)
    elif config.draws_randomly:
        return _windows_of_long_documents(config, islice(texts, MOST_DOCUMENTS), tokenizer)
    else:
        ids = _tokenise_enough(texts, tokenizer, config.sequences * config.tokens)
    _require_enough(config, len(ids))
    return _random_windows(config, ids) if config.draws_randomly else _cut(ids, config.tokens)[: config.sequences]


def _require_enough(config: CalibrationConfig, have: int) -> None:
    need = config.sequences * config.tokens
    if have < need:
        raise CalibrationError(
            f"{describe(config.source)} gives {have} tokens, and {config.sequences} sequences x "
            f"{config.tokens} tokens need {need}; use more text, at most {have // config.tokens} sequences "
            f"of this length, or sequences of at most {have // config.sequences} tokens"
        )


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, need: int) -> torch.Tensor:
    """At least the first `need` tokens of the text, if it has so many, without tokenising all of a long text."""
    end = CHARACTERS_PER_TOKEN * (need + MARGIN_TOKENS)
    while end < len(text):
        ids = _tokenise(text[:end], tokenizer)
        if len(ids) >= need + MARGIN_TOKENS:
            return ids
        end *= 2
    return _tokenise(text, tokenizer)


def _tokenise_enough(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, need: int) -> torch.Tensor:
    """The tokens of the documents joined by blank lines, reading no more than `need` tokens ask for."""
    read: list[str] = []
    num_characters = 0
    goal = CHARACTERS_PER_TOKEN * need
    for text in texts:
        read.append(text)
        num_characters += len(text)
        if num_characters >= goal:
            ids = _tokenise("\n\n".join(read), tokenizer)
            if len(ids) >= need + MARGIN_TOKENS:
                return ids
            goal = 2 * num_characters
    return _tokenise("\n\n".join(read), tokenizer)


def _random_windows(config: CalibrationConfig, ids: torch.Tensor) -> torch.Tensor:
    """[N, T] windows at random places of one text, in random order, no token in two of them."""
    generator = _generator(config)
    num_spare = len(ids) - config.sequences * config.tokens
    # Sorted gaps before each window make every placement of N windows in the text possible, and none overlap.
    gaps_N = torch.randint(num_spare + 1, (config.sequences,), generator=generator).sort().values
    starts_N = gaps_N + config.tokens * torch.arange(config.sequences)
    order_N = torch.randperm(config.sequences, generator=generator)
    return torch.stack([ids[start : start + config.tokens] for start in starts_N[order_N].tolist()])


def _windows_of_long_documents(
    config: CalibrationConfig, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """The C4 protocol: [N, T], each row a random window of a document of more than T tokens."""
    generator = _generator(config)
    windows: list[torch.Tensor] = []
    num_read = 0
    for text in _shuffled(texts, generator):
        num_read += 1
        ids = _tokenise(text, tokenizer)
        if len(ids) > config.tokens:
            start = int(torch.randint(len(ids) - config.tokens + 1, (), generator=generator))
            windows.append(ids[start : start + config.tokens])
            if len(windows) == config.sequences:
                return torch.stack(windows)
    raise CalibrationError(
        f"{len(windows)} of the {num_read} documents read from {describe(config.source)} are longer than "
        f"{config.tokens} tokens, and {config.sequences} are needed; ask for fewer or shorter sequences, or "
        "for `sample: first`, which joins documents"
    )


def _shuffled(texts: Iterable[str], generator: torch.Generator) -> Iterator[str]:
    """The documents in an order drawn from the generator, out of a buffer of the next SHUFFLE_DOCUMENTS."""
    stream = iter(texts)
    buffer = list(islice(stream, SHUFFLE_DOCUMENTS))
    for text in stream:
        slot = int(torch.randint(len(buffer), (), generator=generator))
        yield buffer[slot]
        buffer[slot] = text
    yield from (buffer[slot] for slot in torch.randperm(len(buffer), generator=generator).tolist())


def _stored_sequences(config: CalibrationConfig, source: TokensFile) -> torch.Tensor:
    """[N, T] of a token file: of [N', T'] the first T of each row, of [num_tokens] consecutive cuts."""
    stored = token_ids(source)
    rows = _cut(stored, config.tokens) if stored.dim() == 1 else stored[:, : config.tokens]
    if rows.shape[0] < config.sequences or rows.shape[1] < config.tokens:
        raise CalibrationError(
            f"{describe(source)} holds ids of shape {list(stored.shape)}, and {config.sequences} sequences x "
            f"{config.tokens} tokens were asked for; ask for fewer or shorter sequences, or store more tokens"
        )
    if config.draws_randomly:
        rows = rows[torch.randperm(len(rows), generator=_generator(config))]
    return rows[: config.sequences]
