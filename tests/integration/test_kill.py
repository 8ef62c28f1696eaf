"""A run that is killed, however often and wherever, ends with the bytes of one that was never disturbed."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.integration.processes import PATIENCE, Child, prune, prune_until_write
from tests.integration.support import INDEX, RecipeEntries, carry_out, job, outcome, write_text
from tests.tiny import FAMILIES, GROUPED, save_tiny

NUM_BLOCKS = 6
KILLS = 20
RECIPE: RecipeEntries = [{"besa": {"target": "dense"}}, "sparsegpt"]
"""Both streams must be rebuilt, and kept weights are new ones, rounded to what is stored."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kill")
    write_text(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "long", LlamaConfig(**{**GROUPED, "num_hidden_layers": NUM_BLOCKS}))
        save_tiny("long", base / "source", torch.bfloat16)
    return base / "source"


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, Any]:
    """The outcome of a run that was left alone, in this process."""
    carry_out(settings(source, "undisturbed"))
    return outcome(source.parent / "undisturbed")


def settings(source: Path, name: str) -> dict[str, Any]:
    plain = job(source, source.parent / name, RECIPE, 0.55, evaluate=None)
    plain["calibration"]["sequences"] = 3
    return plain


def duration_of(settings: dict[str, Any]) -> float:
    """Seconds that a whole run takes in a process of its own."""
    with Child(prune, settings) as child:
        child.wait_for_report()
        began = time.monotonic()
        assert child.exit_status() == 0
        return time.monotonic() - began


def no_leftovers(run_directory: Path) -> bool:
    return not list(run_directory.rglob(".*.tmp"))


def holds_whole_model(run_directory: Path, undisturbed: dict[str, Any]) -> bool:
    """Whether every file is there and final; a file being written again may lie beside it."""
    files = outcome(run_directory)["files"]
    return bool({n: digest for n, digest in files.items() if not n.endswith(".tmp")} == undisturbed["files"])


def test_a_run_killed_at_random_instants_ends_with_the_same_bytes(source: Path, undisturbed: dict[str, Any]) -> None:
    longest, instants = duration_of(settings(source, "timed")), random.Random(0)
    assert outcome(source.parent / "timed") == undisturbed
    num_killed, directory, finished = 0, 0, False
    while num_killed < KILLS or not finished:
        with Child(prune, settings(source, f"killed {directory}")) as child:
            child.wait_for_report()
            child.process.join(instants.uniform(0, longest) if num_killed < KILLS else PATIENCE)
        finished = child.process.exitcode == 0
        if finished:  # before its instant had come: hold it against the other, and begin anew
            assert outcome(source.parent / f"killed {directory}") == undisturbed
            assert no_leftovers(source.parent / f"killed {directory}")
            directory += 1
        else:
            assert child.process.exitcode == -signal.SIGKILL
            num_killed += 1
            assert num_killed <= KILLS, "the last attempt hangs"


def test_a_run_killed_at_each_write_in_turn_ends_with_the_same_bytes(source: Path, undisturbed: dict[str, Any]) -> None:
    """Attempt n dies at the n-th write, fsync, rename or truncation it makes: every step of a block's commit."""
    run_directory = source.parent / "one write more"
    for deadly in range(1, 1000):
        with Child(prune_until_write, settings(source, run_directory.name), deadly) as child:
            status = child.exit_status()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not (run_directory / "model" / INDEX).exists() or holds_whole_model(run_directory, undisturbed)
    assert deadly > 20
    assert outcome(run_directory) == undisturbed
    assert no_leftovers(run_directory)
