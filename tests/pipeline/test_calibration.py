"""Calibration: the right tokens, the same on every run, and a way out where there are too few.

The tokenizer here has one token a byte, so that tokens can be read back and counted by eye.
"""

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline import calibration
from pipeline.calibration import CalibrationConfig, digest, load_calibration, load_tokenizer, text_windows
from pipeline.errors import CalibrationError
from pipeline.sources import Hub, JsonLines, Source, TextFile, TokensFile

VOCABULARY = 256
Sample = Literal["auto", "first", "random"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer without merges, made for a context of eight tokens."""
    directory = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


@pytest.fixture
def warnings_of_transformers() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def text_source(directory: Path, text: str) -> TextFile:
    (directory / "text.txt").write_text(text, encoding="utf-8")
    return TextFile(text=directory / "text.txt")


def row_source(directory: Path, rows: Sequence[str | None]) -> JsonLines:
    (directory / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return JsonLines(jsonl=directory / "rows.jsonl")


def token_source(directory: Path, tokens: torch.Tensor) -> TokensFile:
    save_file({"tokens": tokens}, directory / "tokens.safetensors")
    return TokensFile(tokens=directory / "tokens.safetensors")


def wanted(source: Source, sequences: int, tokens: int, *, sample: Sample = "auto", seed: int = 0) -> CalibrationConfig:
    return CalibrationConfig(source=source, sequences=sequences, tokens=tokens, sample=sample, seed=seed)


def sequences(config: CalibrationConfig, model: Path) -> list[str]:
    """The calibration set, read back as text."""
    tokens_NT = load_calibration(config, model, VOCABULARY).tokens_NT
    assert tokens_NT.shape == (config.sequences, config.tokens)
    assert tokens_NT.dtype == torch.int64
    return [load_tokenizer(model).decode(row) for row in tokens_NT]


def stored(config: CalibrationConfig) -> list[list[int]]:
    """The calibration set of a token file, for which no tokenizer is needed."""
    return load_calibration(config, Path("/nowhere"), 1000).tokens_NT.tolist()


def test_first_cuts_a_text_into_consecutive_sequences_from_its_start(tmp_path: Path, model: Path) -> None:
    config = wanted(text_source(tmp_path, ALPHABET), 3, 10)
    assert sequences(config, model) == ["abcdefghij", "klmnopqrst", "uvwxyz0123"]


def test_first_joins_rows_by_blank_lines(tmp_path: Path, model: Path) -> None:
    config = wanted(row_source(tmp_path, ["abc", "defg", "hij"]), 2, 6)
    assert sequences(config, model) == ["abc\n\nd", "efg\n\nh"]


@pytest.mark.parametrize("length", [1, 7, 300])
def test_first_of_rows_is_the_start_of_the_whole_text(tmp_path: Path, model: Path, length: int) -> None:
    rows = [ALPHABET[index % 36] * length for index in range(2000)]
    config = wanted(row_source(tmp_path, rows), 4, 25)
    assert "".join(sequences(config, model)) == "\n\n".join(rows)[:100]


def test_first_reads_no_more_rows_than_it_needs(tmp_path: Path, model: Path) -> None:
    """The last row has no text, which would be an error had it been read."""
    config = wanted(row_source(tmp_path, ["abcdef"] * 200 + [None]), 2, 6)
    assert sequences(config, model) == ["abcdef", "\n\nabcd"]


def test_the_embedded_text_is_the_default_and_needs_nothing_else(model: Path) -> None:
    config = CalibrationConfig(sequences=2, tokens=64)
    assert config.source == "embedded"
    assert "assert" in "".join(sequences(config, model)).lower()


def test_auto_is_random_for_the_hub_and_first_for_everything_else() -> None:
    assert CalibrationConfig(source=Hub(hub="a/b")).draws_randomly
    assert not CalibrationConfig(source=Hub(hub="a/b"), sample="first").draws_randomly
    for source in ("embedded", JsonLines(jsonl=Path("a")), TokensFile(tokens=Path("a"))):
        assert not CalibrationConfig(source=source).draws_randomly
        assert CalibrationConfig(source=source, sample="random").draws_randomly


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 9), number=st.integers(1, 9), spare=st.integers(0, 30), seed=st.integers(0, 99))
def test_random_windows_never_share_a_token(length: int, number: int, spare: int, seed: int) -> None:
    config = wanted("embedded", number, length, seed=seed, sample="random")
    windows = calibration._random_windows(config, torch.arange(number * length + spare))
    assert windows.shape == (number, length)
    assert len(set(windows.flatten().tolist())) == windows.numel()
    assert (windows.diff(dim=1) == 1).all()


def test_every_placement_of_windows_in_a_text_is_possible() -> None:
    def starts(seed: int) -> tuple[int, ...]:
        config = wanted("embedded", 2, 2, seed=seed, sample="random")
        return tuple(sorted(calibration._random_windows(config, torch.arange(6))[:, 0].tolist()))

    assert {starts(seed) for seed in range(100)} == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}


def test_random_rows_give_one_window_of_each_long_document(tmp_path: Path, model: Path) -> None:
    long = [letter.upper() * 5 + letter * 5 for letter in ALPHABET[:20]]
    short = ["-" * 8] * 50
    config = wanted(row_source(tmp_path, short + long + short), 20, 8, sample="random")
    windows = sequences(config, model)
    assert all(any(window in document for document in long) for window in windows)
    assert sorted(window[4].lower() for window in windows) == sorted(ALPHABET[:20])
    assert len({window.count(window[0]) for window in windows}) > 1


def test_shuffling_loses_and_repeats_no_document_of_a_long_stream() -> None:
    texts = [str(index) for index in range(2 * calibration.SHUFFLE_DOCUMENTS + 1)]
    shuffled = list(calibration._shuffled(texts, torch.Generator().manual_seed(0)))
    assert shuffled != texts
    assert sorted(shuffled) == sorted(texts)


@pytest.mark.parametrize("rows", [True, False])
def test_random_sequences_depend_on_the_seed_alone(tmp_path: Path, model: Path, rows: bool) -> None:
    source = row_source(tmp_path, [letter * 9 for letter in ALPHABET]) if rows else text_source(tmp_path, ALPHABET * 10)

    def drawn(seed: int) -> list[str]:
        config = wanted(source, 5, 4, seed=seed, sample="random")
        return sequences(config, model)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_stream_that_ends_too_early_says_how_many_were_long(tmp_path: Path, model: Path) -> None:
    rows = ["abc", "abcd", "abcde", "abcdef"]
    config = wanted(row_source(tmp_path, rows), 3, 4, sample="random")
    fact = "2 of the 4 documents read .* longer than 4 tokens, and 3 are needed; ask for .* `sample: first`"
    with pytest.raises(CalibrationError, match=fact):
        load_calibration(config, model, VOCABULARY)


def test_a_stream_without_long_documents_is_not_read_for_ever(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_DOCUMENTS", 7)
    config = wanted(row_source(tmp_path, ["a"] * 50), 1, 4, sample="random")
    with pytest.raises(CalibrationError, match="0 of the 7 documents read"):
        load_calibration(config, model, VOCABULARY)


@pytest.mark.parametrize("sample", ["first", "random"])
def test_too_short_a_text_is_answered_with_what_fits(tmp_path: Path, model: Path, sample: Sample) -> None:
    source = text_source(tmp_path, ALPHABET)
    fact = "gives 36 tokens, and 4 sequences x 10 tokens need 40"
    way_out = "use more text, at most 3 sequences of this length, or sequences of at most 9 tokens"
    with pytest.raises(CalibrationError, match=f"{fact}; {way_out}"):
        load_calibration(wanted(source, 4, 10, sample=sample), model, VOCABULARY)


def test_an_id_outside_the_model_s_vocabulary_is_refused(tmp_path: Path, model: Path) -> None:
    config = wanted(text_source(tmp_path, "zzzz"), 1, 4)
    with pytest.raises(CalibrationError, match=r"token id \d+ from \{text: .*\(0\.\.9\); the tokenizer"):
        load_calibration(config, model, 10)


@pytest.mark.parametrize(("tokens", "wrong"), [([0, 5], "5"), ([4, -1], "-1")])
def test_the_vocabulary_holds_the_ids_from_zero_to_below_its_size(tokens: list[int], wrong: str) -> None:
    calibration.require_in_vocabulary(torch.tensor([0, 4]), 5, "here")
    with pytest.raises(CalibrationError, match=rf"token id {wrong} from here is outside .*\(0\.\.4\)"):
        calibration.require_in_vocabulary(torch.tensor(tokens), 5, "here")


def test_ready_rows_are_taken_in_order_and_cut_to_length(tmp_path: Path) -> None:
    source = token_source(tmp_path, torch.arange(15, dtype=torch.int32).view(3, 5))
    assert stored(wanted(source, 2, 3)) == [[0, 1, 2], [5, 6, 7]]


def test_a_ready_stream_of_tokens_is_cut_from_its_start(tmp_path: Path) -> None:
    source = token_source(tmp_path, torch.arange(10))
    assert stored(wanted(source, 2, 3)) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("shape", [(36, 4), (144,)])
def test_random_picks_different_rows_of_ready_tokens(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = token_source(tmp_path, torch.arange(144).view(shape))
    rows = stored(wanted(source, 20, 4, sample="random"))
    assert rows != stored(wanted(source, 20, 4, sample="random", seed=1))
    assert {tuple(row) for row in rows} < set(map(tuple, torch.arange(144).view(36, 4).tolist()))
    assert len({row[0] for row in rows}) == 20


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (8,)])
def test_too_few_ready_tokens_are_refused_with_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = token_source(tmp_path, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"shape \[[\d, ]+\], and 3 sequences x 3 tokens .* ask for"):
        stored(wanted(source, 3, 3))


def test_the_digest_is_of_the_shape_and_of_little_endian_ids() -> None:
    tokens_NT = torch.arange(6).view(2, 3)
    assert digest(tokens_NT) == hashlib.sha256(b"(2, 3)" + struct.pack("<6q", *range(6))).hexdigest()
    assert digest(tokens_NT.view(3, 2)) != digest(tokens_NT)


def test_a_set_knows_its_digest_and_says_how_it_was_made(tmp_path: Path) -> None:
    source = token_source(tmp_path, torch.arange(6).view(2, 3))
    first = wanted(source, 2, 2)
    made = load_calibration(first, tmp_path, 6)
    assert made.sha256 == digest(torch.tensor([[0, 1], [3, 4]]))
    assert made.tokens_NT.is_contiguous()
    assert made.description == f"first 2 sequences x 2 tokens of {{tokens: {source.tokens}}}"
    random = first.model_copy(update={"sample": "random", "seed": 7})
    assert load_calibration(random, tmp_path, 6).description.startswith("random (seed 7) 2 sequences x 2")


def test_windows_are_as_many_as_fit_or_as_the_limit_allows(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.decode(row) for row in text_windows("abcdefgh", tokenizer, 3, None)] == ["abc", "def"]
    assert [tokenizer.decode(row) for row in text_windows("abcdefgh", tokenizer, 3, 1)] == ["abc"]
    assert text_windows("abcdefgh", tokenizer, 3, 9).shape == (2, 3)


def test_a_text_shorter_than_one_window_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CalibrationError, match="has 2 tokens, and one window needs 3; use more text"):
        text_windows("ab", tokenizer, 3, None)


def test_a_text_longer_than_the_model_s_context_raises_no_warning(
    tokenizer: PreTrainedTokenizerBase, warnings_of_transformers: list[str]
) -> None:
    text_windows("longer than eight tokens", tokenizer, 3, None)
    assert warnings_of_transformers == []
    tokenizer("longer than eight tokens")
    assert "longer than the specified maximum" in warnings_of_transformers[0]


def test_a_directory_without_a_tokenizer_is_refused_without_asking_a_network(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory, reason in ((tmp_path / "gone", "there is no such directory"), (tmp_path / "empty", "")):
        message = f"(?s)no tokenizer can be loaded from {directory}: {reason}.*; put the model's"
        with pytest.raises(CalibrationError, match=message):
            load_tokenizer(directory)


@pytest.mark.parametrize(
    ("key", "value"), [("sequences", 0), ("tokens", 1), ("seed", -1), ("sample", "last"), ("sequence", 3)]
)
def test_a_config_out_of_bounds_cannot_be_made(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        CalibrationConfig.model_validate({key: value})
