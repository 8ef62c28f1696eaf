"""Settings that cannot be run: each is refused with the fact and the way out, and nobody's files are touched."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.integration.support import job, refusal, untouched, write_text
from tests.tiny import save_tiny

Refuse = Callable[[dict[str, Any]], str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("settings")
    write_text(base)
    save_tiny("llama", base / "source")
    return base / "source"


@pytest.fixture
def refuse(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the command with some sections of the configuration; return the error it ends with."""

    def run_and_refuse(sections: dict[str, Any]) -> str:
        config = tmp_path / "job.yaml"
        config.write_text(yaml.safe_dump(job(source, tmp_path / "run") | sections))
        return refusal(config, source, monkeypatch, capsys)

    return run_and_refuse


def test_every_problem_of_a_configuration_is_told_at_once_with_the_nearest_key(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse(
        {
            "prune": {"sparsitty": 0.6, "recipe": ["wonda", {"besa": {"epoch": 2}}]},
            "compute": {"batch": 0},
            "evaluate": {"text": "x", "sequence_lenght": 3},
            "fruit": "green",
        }
    )
    lines = message.splitlines()
    assert lines[0].startswith(f"{tmp_path}/job.yaml: ")
    for problem in (
        "prune.sparsitty: unknown key; did you mean 'sparsity'?",
        "compute.batch: Input should be greater than or equal to 1 (got 0)",
        "evaluate.sequence_lenght: unknown key; did you mean 'sequence_length'?",
        "fruit: unknown key; known keys: model, output, calibration, prune, compute, memory, evaluate, cluster",
    ):
        assert f"  {problem}" in lines
    assert lines[0].endswith(f" {len(lines) - 1} problems")


def test_every_problem_of_a_recipe_is_told_at_once(refuse: Refuse) -> None:
    message = refuse({"prune": {"recipe": ["wonda", {"besa": {"epoch": 2, "reach": -1}}, {"a": {}, "b": {}}]}})
    assert "[0] no method is called 'wonda'; did you mean 'wanda'?" in message
    assert "[1] besa.epoch: " in message
    assert "[1] besa.reach: " in message
    assert "options: target, epochs, batch, granularity, mix, quantize, penalty, reach, growth" in message
    assert "[2] a step is a name or one `name: {options}`" in message
    assert ": 4 problems" in message


@pytest.mark.parametrize(
    ("sparsity", "fact"),
    [
        (0, "sparsity is 0; the fraction removed must be above 0 and below 1"),
        (0.0, "sparsity is 0; the fraction removed must be above 0 and below 1"),
        (1, "sparsity is 1.0; the fraction removed must be"),
        (-0.1, "sparsity is -0.1; the fraction removed must be"),
        (50, "sparsity is 50.0; the fraction removed must be"),
        (float("nan"), "sparsity is nan; the fraction removed must be"),
        ("abc", "sparsity 'abc' is neither a fraction such as 0.5 nor a pattern such as 2:4"),
        ("50%", "sparsity '50%' is neither a fraction such as 0.5 nor a pattern such as 2:4"),
        ("4:2", "pattern 4:2 keeps 4 of 2; the number kept must be at least 1 and below the group size"),
        ("4:4", "pattern 4:4 keeps 4 of 4; the number kept must be"),
        ("0:4", "pattern 0:4 keeps 0 of 4; the number kept must be"),
        ("2:x", "pattern '2:x' is not KEPT:GROUP, two whole numbers such as 2:4"),
    ],
)
def test_a_sparsity_out_of_range_is_refused(sparsity: float | str, fact: str, refuse: Refuse) -> None:
    message = refuse({"prune": {"sparsity": sparsity, "recipe": ["wanda"]}})
    assert re.search(rf"prune(\.sparsity)?: {re.escape(fact)}", message)


def test_a_pattern_that_does_not_divide_the_rows_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse({"prune": {"sparsity": "3:5", "recipe": ["wanda"]}, "evaluate": None})
    assert "self_attn.q_proj has 32 input features, not a multiple of the group of 5 in 3:5" in message
    assert "add it to prune.skip, or use another pattern or an unstructured sparsity" in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_pattern_that_divides_some_rows_only_is_refused_for_the_others(refuse: Refuse) -> None:
    message = refuse({"prune": {"sparsity": "2:32", "recipe": ["magnitude"]}})
    assert "mlp.down_proj has 48 input features, not a multiple of the group of 32 in 2:32" in message


def test_a_learnt_sparsity_and_a_fixed_pattern_exclude_each_other(refuse: Refuse) -> None:
    message = refuse({"prune": {"sparsity": "2:4", "recipe": ["besa"]}})
    assert "besa learns how many weights each row drops, which 2:4 fixes" in message
    assert "use wanda or sparsegpt for 2:4 everywhere" in message


def test_a_skip_that_leaves_nothing_to_prune_is_refused(refuse: Refuse) -> None:
    message = refuse({"prune": {"recipe": ["wanda"], "skip": ["*"]}})
    assert "prune.skip" in message


def test_a_skip_that_matches_nothing_is_refused(refuse: Refuse) -> None:
    message = refuse({"prune": {"recipe": ["wanda"], "skip": ["mlp.donw_proj"]}})
    assert "mlp.donw_proj" in message
    assert "prune.skip" in message


def test_too_few_calibration_tokens_are_counted(refuse: Refuse, source: Path) -> None:
    text = {"text": str(source.parent / "text.txt")}
    message = refuse({"calibration": {"source": text, "sequences": 100, "tokens": 24}})
    assert "gives 2000 tokens, and 100 sequences x 24 tokens need 2400" in message
    assert "use more text, at most 83 sequences of this length, or sequences of at most 20 tokens" in message


def test_sequences_longer_than_the_model_has_positions_are_refused(refuse: Refuse, source: Path) -> None:
    """gpt2 looks its positions up in a table, here of 64."""
    save_tiny("gpt2", source.parent / "gpt2")
    text = {"text": str(source.parent / "text.txt")}
    calibration = {"source": text, "sequences": 2, "tokens": 80}
    message = refuse({"model": str(source.parent / "gpt2"), "calibration": calibration, "evaluate": None})
    assert "80" in message
    assert "64" in message
    evaluation = {**text, "sequence_length": 80, "windows": 1}
    message = refuse({"model": str(source.parent / "gpt2"), "evaluate": evaluation})
    assert "80" in message
    assert "64" in message


def test_too_few_windows_are_counted(refuse: Refuse, source: Path) -> None:
    text = str(source.parent / "text.txt")
    message = refuse({"evaluate": {"text": text, "sequence_length": 60, "windows": 34}})
    assert "gives 33 windows of 60 tokens, but evaluate.windows asks for 34" in message
    assert "use more text, or fewer or shorter windows" in message


@pytest.mark.parametrize("bad", [-1, 96])
def test_token_ids_outside_the_vocabulary_are_refused(bad: int, refuse: Refuse, tmp_path: Path) -> None:
    tokens = torch.full((4, 8), 7)
    tokens[2, 3] = bad
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    source = {"tokens": str(tmp_path / "tokens.safetensors")}
    message = refuse({"calibration": {"source": source, "sequences": 4, "tokens": 8}})
    assert f"token id {bad} from {{tokens: {tmp_path}/tokens.safetensors}} is outside the model's vocabulary" in message
    assert "(0..95); the tokenizer, or the token file, belongs to another model" in message


def test_a_calibration_file_that_is_not_there_is_named(refuse: Refuse, tmp_path: Path) -> None:
    source = {"text": str(tmp_path / "nowhere.txt")}
    message = refuse({"calibration": {"source": source, "sequences": 2, "tokens": 8}})
    assert f"there is no file {tmp_path}/nowhere.txt" in message


def test_a_device_that_is_not_there_is_named(refuse: Refuse) -> None:
    for device in ("cuda:7", "warp"):
        message = refuse({"compute": {"device": device}})
        assert f"compute.device: '{device}' cannot be used here" in message
        assert "use auto, or cpu" in message


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "lock", "model/model.safetensors"])
def test_an_output_directory_with_somebody_elses_file_is_refused_and_left_as_it_is(
    name: str, refuse: Refuse, tmp_path: Path
) -> None:
    theirs = tmp_path / "run" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with untouched(tmp_path / "run"):
        message = refuse({})
    assert "is an existing output directory of another job" in message
    assert "name a new or empty output directory" in message


def test_the_source_cannot_be_the_output(refuse: Refuse, source: Path) -> None:
    message = refuse({"output": str(source)})
    assert "name a new or empty output directory" in message


def test_an_output_below_a_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    message = refuse({"output": str(tmp_path / "file" / "run")})
    assert f"{tmp_path}/file/run" in message
    assert "Not a directory; make room or put the permissions right" in message
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_that_is_a_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    message = refuse({"output": str(tmp_path / "run")})
    assert "File exists; make room or put the permissions right" in message
    assert (tmp_path / "run").read_text() == "precious"


def test_a_file_in_the_place_of_the_model_directory_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").write_text("precious")
    assert "is an existing output directory of another job" in refuse({})
    assert (tmp_path / "run" / "model").read_text() == "precious"
