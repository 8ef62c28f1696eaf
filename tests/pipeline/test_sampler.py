"""A model writes text: its own distribution, its own cache, the same tokens for the same seed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pipeline import sampler
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CalibrationError, NumericsError
from pipeline.own_text import SelfOptions
from pipeline.sampler import Marks, draw, marks_of, sample_sequences
from pipeline.skeleton import Skeleton
from tests.tiny import FAMILIES, GROUPED, VOCAB, WINDOW, save_tiny

CPU = torch.device("cpu")
START, END = 1, 2
Alter = Callable[[PreTrainedModel], None]


def skeleton_of(directory: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(Checkpoint.open(directory), CPU, dtype)


def written(directory: Path, shape: tuple[int, int], seed: int = 0, batch: int = 4, **options: float) -> torch.Tensor:
    asked = SelfOptions.model_validate({"batch": batch, **options})
    return sample_sequences(skeleton_of(directory), *shape, asked, seed, lambda num_tokens: None)


def save_altered(directory: Path, alter: Alter, **marks: object) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, **marks}), dtype=torch.float32)
    alter(model)
    model.save_pretrained(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_drawn_from_what_the_whole_model_says_of_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(family, tmp_path)
    seen: list[torch.Tensor] = []

    def watched(logits_BV: torch.Tensor, options: SelfOptions, generator: torch.Generator) -> torch.Tensor:
        seen.append(logits_BV)
        return draw(logits_BV, options, generator)

    monkeypatch.setattr(sampler, "draw", watched)
    tokens_BT = written(tmp_path, (3, 3 * WINDOW))
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits[:, :-1]
    told_BT, whole_BT = (
        logits.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None]) for logits in (torch.stack(seen, 1), logits_BTV)
    )
    torch.testing.assert_close(told_BT, whole_BT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_a_prompt_is_what_the_whole_model_says_of_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = save_tiny(family, tmp_path), []
    monkeypatch.setattr(sampler, "draw", lambda logits_BV, *_: seen.append(logits_BV) or logits_BV.argmax(-1))
    prompts = torch.arange(3, 3 + 3 * 5).view(3, 5)
    options = SelfOptions(batch=2)
    tokens_NT = sample_sequences(skeleton_of(tmp_path), 3, WINDOW + 8, options, 0, lambda n: None, prompts)
    assert torch.equal(tokens_NT[:, :5], prompts)
    with torch.no_grad():
        logits_NTV = model(tokens_NT).logits[:, 4:-1]
    first, second = torch.stack(seen[: len(seen) // 2], 1), torch.stack(seen[len(seen) // 2 :], 1)
    torch.testing.assert_close(torch.cat([first, second]), logits_NTV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_the_same_seed_gives_the_same_tokens_and_another_one_others(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    tokens_NT = written(tmp_path, (6, 12))
    assert (tokens_NT.dtype, tokens_NT.shape) == (torch.int64, (6, 12))
    assert torch.equal(written(tmp_path, (6, 12)), tokens_NT)
    assert not torch.equal(written(tmp_path, (6, 12), seed=1), tokens_NT)
    assert len(tokens_NT.unique(dim=0)) == 6  # the second batch is not the first one again


def test_every_sequence_is_full_and_a_document_that_ends_is_followed_by_the_start_of_another(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tokens_NT = written(tmp_path, (40, 24), batch=20)
    rows, columns = (tokens_NT[:, :-1] == END).nonzero(as_tuple=True)
    assert len(rows) > 3
    assert set(tokens_NT[rows, columns + 1].tolist()) == {START} == set(tokens_NT[:, 0].tolist())


def test_whoever_counts_is_told_of_every_token_and_may_end_the_writing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    counts: list[int] = []
    skeleton, options = skeleton_of(tmp_path), SelfOptions(batch=4)
    sample_sequences(skeleton, 6, 5, options, 0, counts.append)
    assert counts == [4] * 5 + [2] * 5

    def enough(num_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_sequences(skeleton, 6, 5, options, 0, enough)
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}


def test_draws_follow_the_softmax_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(shares.log().expand(20_000, 5), SelfOptions(), generator)
    found = drawn.bincount(minlength=5) / 20_000
    assert found[[1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(found, shares, rtol=0, atol=0.015)
    colder = draw(shares.log().expand(20_000, 5), SelfOptions(temperature=0.5), generator)
    torch.testing.assert_close(colder.bincount(minlength=5) / 20_000, shares**2 / 0.38, rtol=0, atol=0.015)


def test_only_the_likeliest_are_drawn_from_where_it_is_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]).expand(200, 5)
    assert set(draw(logits, SelfOptions(top_k=1), generator).tolist()) == {1}
    assert set(draw(logits, SelfOptions(top_k=2), generator).tolist()) == {1, 2, 3}  # two are equally likely
    assert set(draw(logits, SelfOptions(top_k=9), generator).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("named", "marks"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6}, Marks(start=5, ends=(6,))),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, Marks(start=7, ends=(7, 8))),
        ({"bos_token_id": 5, "eos_token_id": None}, Marks(start=5, ends=())),
    ],
)
def test_documents_begin_with_bos_else_with_eos(named: dict[str, object], marks: Marks, tmp_path: Path) -> None:
    save_altered(tmp_path, lambda model: None, **named)
    assert marks_of(skeleton_of(tmp_path)) == marks


def test_a_model_without_a_token_to_begin_with_is_refused(tmp_path: Path) -> None:
    save_altered(tmp_path, lambda model: None, bos_token_id=None, eos_token_id=None)
    with pytest.raises(CalibrationError, match=r"names neither bos_token_id nor eos_token_id; .* another source"):
        marks_of(skeleton_of(tmp_path))


def test_a_start_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    save_altered(tmp_path, lambda model: None, bos_token_id=VOCAB)
    with pytest.raises(CalibrationError, match=r"token id 96 from config.json is outside the model's vocabulary"):
        marks_of(skeleton_of(tmp_path))


def test_logits_that_are_not_finite_end_the_writing_by_name(tmp_path: Path) -> None:
    def overflow(model: PreTrainedModel) -> None:
        model.lm_head.weight.data.fill_(3e38)

    save_altered(tmp_path, overflow)
    with pytest.raises(NumericsError, match=r"NaN or Inf at token 1 of the calibration text .* another source"):
        written(tmp_path, (2, 5))
