"""Runs that keep hidden states on disk, for the tests in which something befalls them: what all of these share.

A test file imports its fixtures:

    from tests.integration.paged_runs import source as source
    from tests.integration.paged_runs import undisturbed as undisturbed
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipeline.ledger import Ledger
from pipeline.progress import Silent
from tests.integration.support import RecipeEntries, carry_out, job, outcome, write_text
from tests.tiny import FAMILIES, GROUPED, save_tiny

NUM_BLOCKS = 4
RECIPE: RecipeEntries = [{"besa": {"batch": 2, "epochs": 1, "target": "dense"}}, "sparsegpt"]
"""Both streams are on disk and must be rebuilt, and kept weights are new ones."""

DISK = {"activations": "disk", "io": "threads"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("faults")
    write_text(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "long", LlamaConfig(**{**GROUPED, "num_hidden_layers": NUM_BLOCKS}))
        save_tiny("long", base / "source", torch.bfloat16)
    return base / "source"


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, Any]:
    """The outcome of a run in memory that was left alone."""
    carry_out(settings(source, source.parent / "undisturbed", memory={}))
    return outcome(source.parent / "undisturbed")


def settings(source: Path, output: Path, **sections: Any) -> dict[str, Any]:
    compute = {"threads": 1, "batch": 2}
    found = job(source, output, RECIPE, **{"compute": compute, "evaluate": None, "memory": DISK, **sections})
    found["calibration"]["sequences"] = 5
    return found


class At(Silent):
    """Does something once, as a run enters a phase of a block."""

    def __init__(self, block: int, phase: str, act: Callable[[], None]) -> None:
        self._when, self._act = (block, phase), act
        self.has_acted = False

    def phase(self, block: int, phase: str) -> None:
        if not self.has_acted and (block, phase) == self._when:
            self.has_acted = True
            self._act()


class AfterTask(Silent):
    """Does something once, as the n-th task ends."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._after, self._act, self._num_ended = number, act, 0

    def end(self) -> None:
        self._num_ended += 1
        if self._num_ended == self._after:
            self._act()


def num_committed(output: Path) -> int:
    return len(Ledger.read(output).commits)


def ends_as(undisturbed: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the run, gone on with, makes the bytes of one that was left alone, and leaves no spool."""
    carry_out(settings)
    output = Path(settings["output"])
    return outcome(output) == undisturbed and not (output / "spool").exists()
