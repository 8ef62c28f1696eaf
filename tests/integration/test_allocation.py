"""Runs whose blocks lose different shares: counted exactly, surveyed once, and the same bytes however often killed."""

import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigChanged, ConfigError, RunStopped, VerificationError
from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.records import Commit
from pipeline.sparsity import parse_sparsity
from pipeline.verify import verify
from tests.integration.processes import Child, prune_until_call
from tests.integration.support import RecipeEntries, carry_out, job, outcome, write_text
from tests.tiny import FAMILIES, SHAPE, save_tiny

OWL = {"owl": {"spread": 0.2, "threshold": 2}}


class Listener(Silent):
    """Remembers what the user is told."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.said: list[str] = []

    def begin(self, task: str, total: int, done: int) -> None:
        self.tasks.append(task)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("allocation")
    write_text(base)
    save_tiny("llama", base / "source", torch.bfloat16)
    return base / "source"


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, Any]:
    """The outcome of a run that was left alone."""
    carry_out(settings(source, source.parent / "undisturbed"))
    return outcome(source.parent / "undisturbed")


def settings(
    source: Path, output: Path, recipe: RecipeEntries = ("wanda",), sparsity: float | str = 0.5, **sections: Any
) -> dict[str, Any]:
    """A job with an allocation by outliers."""
    plain = job(source, output, recipe, sparsity, **{"evaluate": None, **sections})
    plain["prune"]["allocation"] = OWL
    return plain


def shares(commit: Commit) -> set[str]:
    return {record.sparsity for record in commit.linears.values()}


def removed(commit: Commit) -> int:
    return sum(record.pruned for record in commit.linears.values())


@pytest.mark.parametrize(
    ("recipe", "sparsity"),
    [
        (["wanda"], 0.55),
        (["besa"], 0.55),
        (["magnitude"], 0.7),
        (["sparsegpt"], "4:8"),
        (["wanda", "sparsegpt"], "4:8"),
    ],
    ids=str,
)
def test_every_block_loses_its_own_share_and_all_together_what_is_asked(
    recipe: RecipeEntries, sparsity: float | str, source: Path, tmp_path: Path
) -> None:
    report = carry_out(settings(source, tmp_path, recipe, sparsity))
    ledger, target = Ledger.read(tmp_path), parse_sparsity(sparsity)
    note = ledger.notes["allocation"]
    assert isinstance(note, dict)
    assert [shares(commit) for commit in ledger.commits.values()] == [{text} for text in note["sparsity"]]
    assert len(set(note["sparsity"])) > 1
    numel = sum(record.numel for record in ledger.commits[0].linears.values())
    asked = [parse_sparsity(text).fraction for text in note["sparsity"]]
    assert abs(sum(asked, Fraction(0)) / len(asked) - target.fraction) < Fraction(1, 10**6)
    for commit, share in zip(ledger.commits.values(), asked, strict=True):
        num_rows = sum(record.numel // 32 for record in commit.linears.values())
        assert share * numel - num_rows < removed(commit) <= share * numel
    assert report.block_sparsity == [removed(commit) / numel for commit in ledger.commits.values()]
    assert report.sparsity == f"{sparsity} by outliers"
    assert verify(tmp_path, source, Silent()).pruned_weights == report.pruned_weights


def test_the_survey_is_told_and_made_once(source: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    progress = Listener()
    with pytest.raises(RunStopped, match="1 of 3 blocks are committed"):
        carry_out(settings(source, tmp_path), progress, lambda: len(Ledger.read(tmp_path).commits) == 1)
    assert progress.tasks[:2] == ["survey", "prune"]
    again = Listener()
    carry_out(settings(source, tmp_path), again)
    assert "survey" not in again.tasks
    told = [line for line in progress.said + again.said if line.startswith("allocation: blocks are pruned to between")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert outcome(tmp_path) == undisturbed


def test_a_stop_ends_a_survey_between_blocks(source: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="0 of 3 blocks are committed"):
        carry_out(settings(source, tmp_path), stop=lambda: True)
    assert "allocation" not in Ledger.read(tmp_path).notes
    carry_out(settings(source, tmp_path))
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("module", "function"),
    [("pipeline.survey", "naming_block"), ("pipeline.allocate", "by_outliers"), ("pipeline.run", "run_stage")],
)
def test_a_run_killed_in_or_after_its_survey_ends_with_the_same_bytes(
    module: str, function: str, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with Child(prune_until_call, settings(source, tmp_path), module, function) as child:
        assert child.exit_status() == -signal.SIGKILL
    assert ("allocation" in Ledger.read(tmp_path).notes) == (function == "run_stage")
    carry_out(settings(source, tmp_path))
    assert outcome(tmp_path) == undisturbed


def test_a_survey_within_ceilings_finds_the_same(source: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    memory = {"host": "8GiB", "activations": "disk", "io": "threads"}
    carry_out(settings(source, tmp_path, memory=memory))
    assert outcome(tmp_path) == undisturbed


def test_another_allocation_is_another_run(source: Path, undisturbed: dict[str, Any]) -> None:
    other = settings(source, source.parent / "undisturbed")
    other["prune"]["allocation"] = {"owl": {"spread": 0.1, "threshold": 2}}
    with pytest.raises(ConfigChanged, match=r"prune\.allocation\.owl\.spread: 0\.2 in the ledger, 0\.1 asked for"):
        carry_out(other)
    other["prune"]["allocation"] = "uniform"
    with pytest.raises(ConfigChanged, match=r"prune\.allocation: .* in the ledger, \"\(absent\)\" asked for"):
        carry_out(other)


def test_uniform_is_what_a_run_without_an_allocation_does(source: Path, tmp_path: Path) -> None:
    plain = job(source, tmp_path / "plain", evaluate=None)
    named = job(source, tmp_path / "named", evaluate=None)
    named["prune"]["allocation"] = "uniform"
    for one in (plain, named):
        carry_out(one)
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "named")
    assert Ledger.read(tmp_path / "plain").header == Ledger.read(tmp_path / "named").header


def test_blocks_that_are_held_at_a_bound_are_named(source: Path, tmp_path: Path) -> None:
    wide, progress = settings(source, tmp_path, sparsity=0.9), Listener()
    wide["prune"]["allocation"] = {"owl": {"spread": 0.4, "threshold": 2}}
    report = carry_out(wide, progress)
    told = next(line for line in progress.said if line.startswith("allocation: "))
    assert "of block " in told
    assert "the spread asks for less or more than a block may lose" in told
    assert max(report.block_sparsity) <= 0.99
    assert report.achieved == pytest.approx(0.9, abs=0.03)


def test_what_cannot_be_pruned_so_is_refused_before_a_survey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path)
    monkeypatch.setitem(FAMILIES, "odd", type(FAMILIES["llama"])(**{**SHAPE, "intermediate_size": 50}))
    save_tiny("odd", tmp_path / "source")
    progress = Listener()
    with pytest.raises(ConfigError, match=r"mlp\.down_proj has 50 input features, not a multiple of the group of 8"):
        carry_out(settings(tmp_path / "source", tmp_path / "run", sparsity="4:8"), progress)
    assert progress.tasks == []


def test_a_whole_that_is_not_what_was_asked_does_not_verify(
    source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    found = Ledger.read(source.parent / "undisturbed")
    prune = found.header.config["prune"]
    assert isinstance(prune, dict)
    header = replace(found.header, config={**found.header.config, "prune": {**prune, "sparsity": 0.6}})
    changed = Ledger.open(tmp_path, header)
    for commit in found.commits.values():
        changed.commit(commit)
    for name, value in found.notes.items():
        changed.record(name, value)
    (tmp_path / "model").symlink_to(source.parent / "undisturbed" / "model")
    with pytest.raises(VerificationError, match=r"weights were pruned, by the ledger; asked was 0\.6, and rounding"):
        verify(tmp_path, source, Silent())
