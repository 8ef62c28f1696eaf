"""A configuration: read, overridden, resolved, and refused with every problem at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import RunConfig, load_config, parse_config, resolved
from pipeline.errors import ConfigError
from pipeline.methods.besa import Besa
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.sources import Hub, TextFile, TokensFile
from pipeline.sparsity import SemiStructured, Unstructured

LEAST = {"model": "/models/m", "output": "/runs/r"}


def parsed(**sections: Any) -> RunConfig:
    return parse_config({**LEAST, **sections}, "the test")


def problems(**sections: Any) -> list[str]:
    """The problems of a configuration, one a line, without the first line, which counts them."""
    with pytest.raises(ConfigError) as refused:
        parsed(**sections)
    first, *lines = refused.value.message.splitlines()
    assert first == f"the test: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


def loaded(directory: Path, text: str, *overrides: str) -> RunConfig:
    path = directory / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_a_model_and_an_output_are_enough() -> None:
    config = parsed()
    assert config.model.path == Path("/models/m")
    assert (config.model.hub, config.model.revision) == (None, "main")
    assert config.output == Path("/runs/r")
    calibration = config.calibration
    assert calibration.source == "embedded"
    assert (calibration.sequences, calibration.tokens) == (128, 512)
    assert (calibration.seed, calibration.sample) == (0, "auto")
    assert (config.prune.sparsity, config.prune.recipe, config.prune.skip) == (0.5, ("besa",), ())
    assert (config.compute.device, config.compute.dtype, config.compute.batch) == ("auto", "auto", 4)
    assert config.evaluate is None


def test_the_defaults_of_an_evaluation_and_of_the_methods() -> None:
    evaluate = parsed(evaluate={}).evaluate
    assert evaluate is not None
    assert (evaluate.source, evaluate.take) == ("embedded", "first")
    assert (evaluate.sequence_length, evaluate.windows) == (512, None)
    besa = Besa()
    assert (besa.granularity, besa.target) == ("row", "pruned")
    assert (besa.epochs, besa.batch, besa.penalty, besa.reach, besa.growth) == (1, 1, 5.0, 1.0, 5.0)
    assert (SparseGPT().damping, SparseGPT().slab) == (0.01, 128)


def test_a_model_is_a_directory_or_a_mapping() -> None:
    assert parsed(model="/x").model == parsed(model={"path": "/x"}).model
    hub = parsed(model={"hub": "org/name", "revision": "abc"}).model
    assert (hub.path, hub.hub, hub.revision) == (None, "org/name", "abc")


def test_an_evaluation_may_name_its_text_directly() -> None:
    short = parsed(evaluate={"text": "/x.txt", "windows": 3}).evaluate
    assert short == parsed(evaluate={"source": {"text": "/x.txt"}, "windows": 3}).evaluate
    assert short is not None
    assert short.source == TextFile(text=Path("/x.txt"))


def test_sources_are_told_by_their_key() -> None:
    hub = parsed(calibration={"source": {"hub": "allenai/c4", "config": "en"}}).calibration.source
    assert hub == Hub(hub="allenai/c4", config="en")
    assert parsed(calibration={"source": {"tokens": "/t"}}).calibration.source == TokensFile(tokens=Path("/t"))


@pytest.mark.parametrize(
    ("sparsity", "target"),
    [
        (0.3, Unstructured(ratio=0.3)),
        ("0.3", Unstructured(ratio=0.3)),
        ("2:4", SemiStructured(keep=2, group=4)),
        (" 3 : 8", SemiStructured(keep=3, group=8)),
    ],
)
def test_a_sparsity_is_a_fraction_or_a_pattern(sparsity: float | str, target: object) -> None:
    assert parsed(prune={"sparsity": sparsity, "recipe": ["wanda"]}).prune.target == target


def test_a_recipe_is_steps_with_options() -> None:
    steps = parsed(prune={"recipe": [{"besa": {"epochs": 2}}, {"sparsegpt": None}]}).prune.steps.steps
    assert steps == (Besa(epochs=2), SparseGPT())


def test_a_file_is_read_with_its_overrides(tmp_path: Path) -> None:
    text = "model: /m\noutput: /o\nprune: {sparsity: 0.5, recipe: [wanda]}\n"
    overrides = [
        "prune.sparsity=0.6",
        "prune.recipe=[{besa: {epochs: 3}}]",
        "calibration.source.text=/a=b.txt",  # a section that the file has not, and a value with a sign of equality
        "compute.batch=2",
        "model=/other",
    ]
    config = loaded(tmp_path, text, *overrides)
    assert config.prune.sparsity == 0.6
    assert config.prune.steps.steps == (Besa(epochs=3),)
    assert config.calibration.source == TextFile(text=Path("/a=b.txt"))
    assert config.compute.batch == 2
    assert config.model.path == Path("/other")


def test_a_later_override_wins(tmp_path: Path) -> None:
    config = loaded(tmp_path, "model: /m\noutput: /o\n", "prune.sparsity=0.6", "prune.sparsity=0.7")
    assert config.prune.sparsity == 0.7


@pytest.mark.parametrize("override", ["prune.sparsity=2:4", "prune.sparsity='2:4'"])
def test_a_pattern_needs_no_quotes_in_an_override(override: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 2:4 for the number 124, in base 60."""
    config = loaded(tmp_path, "model: /m\noutput: /o\nprune: {recipe: [wanda]}\n", override)
    assert config.prune.target == SemiStructured(keep=2, group=4)


def test_a_pattern_needs_no_quotes_in_a_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, "model: /m\noutput: /o\nprune: {recipe: [wanda], sparsity: 4:8}\n")
    assert config.prune.target == SemiStructured(keep=4, group=8)


def test_an_empty_section_can_be_filled_by_an_override(tmp_path: Path) -> None:
    assert loaded(tmp_path, "model: /m\noutput: /o\nprune:\n", "prune.sparsity=0.6").prune.sparsity == 0.6


FULL = {
    "model": {"hub": "org/name", "revision": "abc"},
    "output": "/runs/r",
    "calibration": {
        "source": {"hub": "a/b", "revision": "c", "field": "body"},
        "sequences": 3, "tokens": 9, "seed": 5, "sample": "first",
    },
    "prune": {"sparsity": "2:4", "recipe": ["wanda", {"sparsegpt": {"damping": 0.1}}], "skip": ["mlp.*"]},
    "compute": {"device": "cpu", "dtype": "bfloat16", "batch": 7},
    "memory": {"device": "20GiB", "host": "16GiB", "spool": "/s", "activations": "disk", "io": "aio"},
    "evaluate": {"text": "/x.txt", "take": "last", "sequence_length": 64, "windows": 2},
}  # fmt: skip


@pytest.mark.parametrize("raw", [LEAST, FULL, {**LEAST, "prune": {"recipe": [{"besa": None}]}, "evaluate": {}}])
def test_a_resolved_configuration_reads_back_as_itself(raw: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(raw, "the test")
    plain = resolved(config)
    again = loaded(tmp_path, yaml.safe_dump(plain))
    assert again == config
    assert resolved(again) == plain


def test_a_resolved_configuration_holds_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a run directory keeps: resuming may happen from elsewhere."""
    monkeypatch.chdir(tmp_path)
    plain = resolved(
        parse_config(
            {
                "model": "m", "output": "o", "calibration": {"source": {"text": "c.txt"}},
                "evaluate": {"source": {"tokens": "e.safetensors"}},
            },
            "the test",
        )
    )  # fmt: skip
    assert plain["model"]["path"] == f"{tmp_path}/m"
    assert plain["output"] == f"{tmp_path}/o"
    assert plain["calibration"]["source"] == {"text": f"{tmp_path}/c.txt"}
    assert plain["evaluate"]["source"] == {"tokens": f"{tmp_path}/e.safetensors"}


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().prune.sparsity = 0.9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"fruit": 1}, "fruit: unknown key; known keys: " + ", ".join(RunConfig.model_fields)),
        ({"prun": {}}, "prun: unknown key; did you mean 'prune'?"),
        ({"model": {"pth": "x", "hub": "a/b"}}, "model.pth: unknown key; did you mean 'path'?"),
        ({"calibration": {"sequence": 3}}, "calibration.sequence: unknown key; did you mean 'sequences'?"),
        ({"prune": {"recipes": []}}, "prune.recipes: unknown key; did you mean 'recipe'?"),
        ({"compute": {"dytpe": "auto"}}, "compute.dytpe: unknown key; did you mean 'dtype'?"),
        ({"evaluate": {"window": 3}}, "evaluate.window: unknown key; did you mean 'windows'?"),
        ({"calibration": {"source": {"text": "x", "filed": "y"}}}, "calibration.source.text.filed: unknown key"),
        ({"model": None}, "model: Input should be a valid dictionary or instance of ModelConfig (got None)"),
        ({"model": {}}, "model: give either `path` (a directory) or `hub` (org/name), not both and not neither"),
        (
            {"model": {"path": "x", "hub": "a/b"}},
            "model: give either `path` (a directory) or `hub` (org/name), not both and not neither",
        ),
        ({"prune": {"recipe": "besa"}}, "prune.recipe: Input should be a valid tuple (got 'besa')"),
        ({"compute": {"batch": 0}}, "compute.batch: Input should be greater than or equal to 1 (got 0)"),
        (
            {"compute": {"dtype": "bf16"}},
            "compute.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16' (got 'bf16')",
        ),
        (
            {"evaluate": {"sequence_length": 1}},
            "evaluate.sequence_length: Input should be greater than or equal to 2 (got 1)",
        ),
        ({"evaluate": {"windows": 0}}, "evaluate.windows: Input should be greater than or equal to 1 (got 0)"),
        ({"evaluate": {"take": "middle"}}, "evaluate.take: Input should be 'first' or 'last' (got 'middle')"),
        (
            {"calibration": {"source": "corpus.txt"}},
            "calibration.source: a source is the word embedded or self, or a mapping with exactly one of the keys "
            "text, jsonl, parquet, arrow, hub, tokens, self; a text file is written {text: FILE} (got 'corpus.txt')",
        ),
    ],
)
def test_each_problem_is_told_with_its_key_path(sections: dict[str, Any], expected: str) -> None:
    assert problems(**sections) == [expected]


@pytest.mark.parametrize(
    ("prune", "problem"),
    [
        ({"sparsity": 0}, "sparsity is 0; the fraction removed must be above 0 and below 1"),
        ({"sparsity": 1.5}, "sparsity is 1.5; the fraction removed must be at least 0 and below 1"),
        ({"recipe": []}, "a recipe needs at least one step"),
        ({"sparsity": "2:4", "recipe": ["besa"]}, "[0] besa learns how many weights each row drops, which 2:4 fixes"),
        ({"sparsity": 0.7, "recipe": [{"besa": {"mix": True}}]}, "[0] besa's `mix` learns how many of every N:M group"),
        ({"recipe": ["wanda", "besa"]}, "[1] besa chooses a mask of its own, but wanda has chosen one before it"),
    ],
)
def test_what_cannot_be_pruned_is_told_in_the_section_of_pruning(prune: dict[str, Any], problem: str) -> None:
    (found,) = problems(prune=prune)
    path, _, message = found.partition(": ")
    assert path.startswith("prune")
    assert message.startswith(problem)


def test_a_required_key_that_is_absent_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"outputs": "x"}, "f.yaml")
    assert refused.value.message.splitlines() == [
        "f.yaml: 3 problems",
        "  model: required, but absent",
        "  output: required, but absent",
        "  outputs: unknown key; did you mean 'output'?",
    ]


def test_all_problems_of_one_section_are_told_at_once() -> None:
    found = problems(prune={"sparsity": 7, "skipp": [], "recipe": ["wonda", {"besa": {"epoch": 2}}]})
    assert [line for line in found if "skipp: unknown key; did you mean 'skip'?" in line]
    assert [line for line in found if "sparsity is 7.0" in line]
    assert [line for line in found if "[0] no method is called 'wonda'; did you mean 'wanda'?" in line]
    assert [line for line in found if "[1] besa.epoch: " in line]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune", r"--set 'prune' is not KEY=VALUE, such as prune\.sparsity=0\.6"),
        ("output.x=1", r"--set 'output\.x=1': output is a value, not a section"),
        ("prune.sparsity=[1", r"--set 'prune\.sparsity=\[1'.* is not YAML"),
        ("prune.sparsety=1", r"prune\.sparsety: unknown key; did you mean 'sparsity'\?"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, "model: /m\noutput: /o\n", override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"config\.yaml holds NoneType; a configuration is a mapping of sections"),
        (b"- a\n", r"config\.yaml holds list; a configuration is a mapping of sections"),
        (b"a: [\n", r"config\.yaml is not YAML: while parsing"),
        (b"\xff\xfe", r"config\.yaml is not YAML: 'utf-8' codec can't decode"),
        (
            b"model: !!python/object/apply:os.getcwd []\n",
            r"config\.yaml is not YAML: could not determine a constructor",
        ),
    ],
)
def test_a_file_that_holds_no_configuration_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot read the configuration {tmp_path}/none: No such file"):
        load_config(tmp_path / "none")
    with pytest.raises(ConfigError, match=rf"cannot read the configuration {tmp_path}: Is a directory"):
        load_config(tmp_path)
