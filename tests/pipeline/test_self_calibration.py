"""Calibration text of the model's own: written once, kept, planned for, refused where the model does not fit."""

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from pipeline.calibration import CalibrationConfig, CalibrationSet, digest, load_calibration
from pipeline.checkpoint import Checkpoint
from pipeline.config import EvaluateConfig, RunConfig, parse_config, resolved
from pipeline.errors import BudgetExceeded, ConfigChanged, ConfigError, RunDirectoryError, RunStopped
from pipeline.ledger import TOKENS_NAME
from pipeline.own_text import SelfOptions, WrittenByModel
from pipeline.planning import plan as planning
from pipeline.planning.plan import Plan, make_plan
from pipeline.progress import Silent
from pipeline.self_calibration import Pace, beginning, prompts_of, self_calibration
from pipeline.skeleton import Skeleton
from pipeline.sources import TokensFile
from tests.tiny import FAMILIES, save_tiny

SHAPE = {"sequences": 5, "tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("self") / "model"
    save_tiny("llama", directory)
    return directory


@pytest.fixture
def skeleton(model: Path) -> Iterator[Skeleton]:
    checkpoint = Checkpoint.open(model)
    yield Skeleton(checkpoint, torch.device("cpu"), torch.float32)
    checkpoint.close()


def config_of(model: Path, output: Path, source: Any = "self", seed: int = 0, **sections: Any) -> RunConfig:
    output.mkdir(exist_ok=True)
    calibration = {"source": source, "seed": seed, **SHAPE}
    raw: dict[str, Any] = {
        "model": str(model), "output": str(output), "calibration": calibration, "compute": {"device": "cpu"},
        "prune": {"recipe": ["wanda"]},
    }  # fmt: skip
    return parse_config(raw | sections, "the test")


def calibrated(config: RunConfig, skeleton: Skeleton) -> CalibrationSet:
    return self_calibration(config, skeleton, Silent(), lambda: False)


def planned(config: RunConfig, model: Path) -> Plan:
    return make_plan(config, model, None, 10**6)


@pytest.mark.parametrize("source", ["self", {"self": {}}, {"self": {"temperature": 1, "batch": 16}}])
def test_the_source_is_a_word_or_a_mapping_of_options(source: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path, source)
    assert config.calibration.source == WrittenByModel(self=SelfOptions())
    assert parse_config(resolved(config), "again") == config


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 0}, "temperature: .* greater than 0"),
        ({"top_k": 0}, "top_k"),
        ({"temprature": 1}, "unknown key"),
    ],
)
def test_options_are_checked(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(tmp_path, tmp_path, {"self": options})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"given": 2}, "continues names a text and given how many of its sequences come first.*give both, or neither"),
        ({"continues": "embedded"}, "give both, or neither"),
        ({"continues": "self", "given": 2}, "a source is the word embedded, or a mapping"),
        ({"continues": "embedded", "given": 5}, "5 sequences are given .* nothing to write of 5 sequences x 12 tokens"),
        (
            {"continues": "embedded", "given": 2, "prompt": 12},
            "goes on from 12 tokens.*lower source.self.given",
        ),
    ],
)
def test_there_must_be_something_to_go_on_from_and_to_write(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(tmp_path, tmp_path, {"self": options})


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Tokens to go on from."""
    save_file({"tokens": torch.arange(3, 27).view(2, 12)}, tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


def going_on(given: Path, **options: Any) -> dict[str, Any]:
    return {"self": {"continues": {"tokens": str(given)}, "given": 2, "prompt": 4, **options}}


def test_the_model_goes_on_from_passages_of_the_sequences_that_are_given(
    model: Path, skeleton: Skeleton, given: Path, tmp_path: Path
) -> None:
    config = config_of(model, tmp_path / "run", going_on(given))
    found = calibrated(config, skeleton)
    given_NT = torch.arange(3, 27).view(2, 12)
    assert torch.equal(found.tokens_NT[:2], given_NT)
    first = [[3, 4, 5, 6], [15, 16, 17, 18], [7, 8, 9, 10]]  # of one after the other; in the next round those after
    assert found.tokens_NT[2:, :4].tolist() == first
    assert not torch.equal(found.tokens_NT[2], given_NT[0])
    assert "3 sequences x 12 tokens that the model wrote itself (seed 0)" in found.description
    assert f"2 sequences of {{tokens: {given}}} and " in found.description
    assert torch.equal(calibrated(config, skeleton).tokens_NT, found.tokens_NT)


def test_another_text_to_go_on_from_is_another_run(
    model: Path, skeleton: Skeleton, given: Path, tmp_path: Path
) -> None:
    calibrated(config_of(model, tmp_path / "run", going_on(given)), skeleton)
    with pytest.raises(ConfigChanged, match="prompt 4, now 3"):
        calibrated(config_of(model, tmp_path / "run", going_on(given, prompt=3)), skeleton)
    given.rename(tmp_path / "moved.safetensors")
    calibrated(config_of(model, tmp_path / "run", going_on(tmp_path / "moved.safetensors")), skeleton)
    save_file({"tokens": torch.arange(4, 28).view(2, 12)}, given)
    with pytest.raises(ConfigChanged, match="continues"):
        calibrated(config_of(model, tmp_path / "run", going_on(given)), skeleton)


def test_passages_follow_each_other_and_begin_again() -> None:
    prompts = prompts_of(torch.arange(10)[None], 5, 3)
    assert prompts.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [1, 2, 3], [4, 5, 6]]


def test_nothing_is_evaluated_on_what_the_model_wrote() -> None:
    with pytest.raises(ValidationError, match="a source is the word embedded, or a mapping with exactly one of"):
        EvaluateConfig.model_validate({"source": "self"})


def test_what_was_written_is_read_ever_after(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    config = config_of(model, tmp_path)
    first = calibrated(config, skeleton)
    path = tmp_path / TOKENS_NAME
    written_at = path.stat().st_mtime_ns
    again = calibrated(config, skeleton)
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert (first.sha256, first.description) == (again.sha256, again.description)
    assert path.stat().st_mtime_ns == written_at
    assert (first.tokens_NT.shape, first.sha256) == ((5, 12), digest(first.tokens_NT))
    assert first.description == "5 sequences x 12 tokens that the model wrote itself (seed 0)"


def test_the_file_serves_other_runs_as_tokens(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    own = calibrated(config_of(model, tmp_path), skeleton)
    source = TokensFile(tokens=tmp_path / TOKENS_NAME)
    others = load_calibration(CalibrationConfig(source=source, **SHAPE), model, skeleton.vocab_size)
    assert others.sha256 == own.sha256


@pytest.mark.parametrize(
    ("changed", "difference"),
    [({"seed": 3}, "seed 0, now 3"), ({"source": {"self": {"temperature": 0.5}}}, r"temperature 1\.0, now 0\.5")],
)
def test_other_settings_than_it_was_written_with_are_refused(
    changed: dict[str, Any], difference: str, model: Path, skeleton: Skeleton, tmp_path: Path
) -> None:
    calibrated(config_of(model, tmp_path), skeleton)
    with pytest.raises(ConfigChanged, match=rf"{TOKENS_NAME} was written with other .*: {difference}; go back to them"):
        calibrated(config_of(model, tmp_path, **changed), skeleton)


def test_a_file_that_the_model_did_not_write_is_refused(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(5, 12, dtype=torch.int64)}, tmp_path / TOKENS_NAME)
    with pytest.raises(RunDirectoryError, match=rf"{TOKENS_NAME} is not what the model wrote: .* or remove it where"):
        calibrated(config_of(model, tmp_path), skeleton)


def test_a_stop_ends_the_writing_and_keeps_nothing(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    answers = iter([False] * 7 + [True])
    facts = rf"wrote its calibration text: 35 of 60 tokens, .* anew with: secateur run {tmp_path}"
    with pytest.raises(RunStopped, match=facts):
        self_calibration(config_of(model, tmp_path), skeleton, Silent(), lambda: next(answers))
    assert list(tmp_path.iterdir()) == []


def test_it_is_said_how_far_the_model_has_come_and_how_long_the_rest_takes() -> None:
    said: list[str] = []
    times = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    pace = Pace(4000, said.append, lambda: next(times))
    for _ in range(4):
        pace.count(1000)
    assert said == ["the model writes its calibration text: 2,000 of 4,000 tokens (20 s left)"]


def test_a_model_above_the_ceiling_is_refused_with_the_way_out(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    config = config_of(model, tmp_path, memory={"host": "1MB"})
    with pytest.raises(BudgetExceeded, match=r"generate needs .* above memory.host: 1 MB.* What would do: memory.host: "
                       r"\d+MiB; or calibration.source: \{tokens: FILE\}, written where the model fits"):  # fmt: skip
        calibrated(config, skeleton)
    assert not (tmp_path / TOKENS_NAME).exists()


def test_without_ceilings_it_must_fit_what_is_free(
    model: Path, skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(0))
    with pytest.raises(BudgetExceeded, match=r"generate needs .* above all that this machine has free \(host\)"):
        calibrated(config_of(model, tmp_path), skeleton)


def test_a_plan_counts_the_writing_and_does_none_of_it(model: Path, tmp_path: Path) -> None:
    generate = planned(config_of(model, tmp_path), model).phases[0]
    assert generate.name == "generate"
    num_weights = sum(entry.num_bytes for entry in Checkpoint.open(model).tensors.values()) // 4
    assert generate.held["weights of the whole model"] == 4 * num_weights
    cached = 2 * 3 * FAMILIES["llama"].num_key_value_heads * 8
    assert generate.held["keys and values"] == 5 * 12 * cached * 4
    assert (generate.flops, generate.bytes_read) == (2 * 5 * 12 * num_weights, 4 * num_weights)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_no_writing_where_it_is_done(model: Path, skeleton: Skeleton, tmp_path: Path) -> None:
    config = config_of(model, tmp_path)
    calibrated(config, skeleton)
    assert "generate" not in [phase.name for phase in planned(config, model).phases]


def test_the_text_is_shown_or_its_ids_where_there_is_no_tokenizer(model: Path, tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 44, 45, 46]])
    assert "H" in beginning(tokens, model)
    assert beginning(tokens, tmp_path) == "1 44 45 46"
