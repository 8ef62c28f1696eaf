"""Where a run keeps its hidden states, and what reads its weights, is seen in its traffic and never in its bytes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.errors import RunStopped
from pipeline.paging.engines import why_not_aio
from pipeline.report import Report
from tests.integration.support import (
    RecipeEntries,
    carry_out,
    committed,
    digests,
    job,
    outcome,
    run_command,
    tensors_in,
    untouched,
    write_text,
)
from tests.stores import ENGINES, Engine
from tests.tiny import GROUPED, save_tiny

SEQUENCES, TOKENS, BATCH = 7, 24, 3
"""The batch does not divide the sequences."""

NUM_BLOCKS = GROUPED["num_hidden_layers"]
SEQUENCE_BYTES = TOKENS * GROUPED["hidden_size"] * 2
"""Of one sequence's hidden states, in bfloat16."""

EPOCHS = 2
BESA: dict[str, Any] = {"besa": {"batch": 2, "epochs": EPOCHS}}
"""Nor does the method's own."""

DENSE: dict[str, Any] = {"besa": {**BESA["besa"], "target": "dense"}}
TUNED: dict[str, Any] = {"reconstruct": {"epochs": 1, "norms": True, "target": "dense"}}
"""After BESA on the pruned stream: both streams and the targets are kept."""

RECIPES: list[RecipeEntries] = [["wanda"], ["sparsegpt"], [BESA], [DENSE], [DENSE, "sparsegpt"], [BESA, TUNED]]
Reference = Callable[[RecipeEntries], dict[str, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("memory")
    write_text(base)
    save_tiny("llama", base / "source", torch.bfloat16)
    return base / "source"


@pytest.fixture(scope="module")
def plain(source: Path) -> Reference:
    """The outcome of a run without a `memory` section, by recipe."""

    def outcome_of(recipe: RecipeEntries) -> dict[str, Any]:
        output = source.parent / f"plain {recipe}"
        if not output.exists():
            carry_out(settings(source, output, recipe))
        return outcome(output)

    return outcome_of


def settings(source: Path, output: Path, recipe: RecipeEntries, **sections: Any) -> dict[str, Any]:
    compute = {"threads": 1, "batch": BATCH, "dtype": "bfloat16"}
    found = job(source, output, recipe, **{"compute": compute, "evaluate": None, **sections})
    found["calibration"] |= {"sequences": SEQUENCES, "tokens": TOKENS}
    return found


def with_evaluation(found: dict[str, Any]) -> dict[str, Any]:
    text = found["calibration"]["source"]["text"]
    return {**found, "evaluate": {"text": text, "sequence_length": 20, "windows": 5}}


def spooled(report: Report) -> int:
    """Bytes that a run has had in its spool at most."""
    return int(report.planned["spool_bytes"]["measured"]) if "spool_bytes" in report.planned else 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("tier", "recipe"),
    [*(("disk", recipe) for recipe in RECIPES), ("host", ["wanda"]), ("host", [DENSE, "sparsegpt"])],
    ids=str,
)
def test_neither_tier_nor_engine_changes_a_byte(
    tier: str, recipe: RecipeEntries, engine: Engine, source: Path, plain: Reference, tmp_path: Path
) -> None:
    if engine == "aio" and (reason := why_not_aio(tmp_path)):
        pytest.skip(reason)
    report = carry_out(settings(source, tmp_path / "run", recipe, memory={"activations": tier, "io": engine}))
    assert outcome(tmp_path / "run") == plain(recipe)
    assert (spooled(report) > 0) == (tier == "disk")
    assert report.traffic["weights_read"] > 0
    assert not (tmp_path / "run" / "spool").exists()


@pytest.mark.parametrize("tier", ["device", "pinned"])
def test_the_memory_of_a_device_that_is_the_hosts_changes_no_byte(
    tier: str, source: Path, plain: Reference, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path / "run", [DENSE, "sparsegpt"], memory={"activations": tier}))
    assert outcome(tmp_path / "run") == plain([DENSE, "sparsegpt"])


def test_an_evaluation_is_the_same_from_the_disk(source: Path, tmp_path: Path) -> None:
    plain = carry_out(with_evaluation(settings(source, tmp_path / "plain", ["wanda"])))
    memory = {"activations": "disk", "io": "threads"}
    paged = carry_out(with_evaluation(settings(source, tmp_path / "paged", ["wanda"], memory=memory)))
    assert paged.perplexity_before == plain.perplexity_before
    assert paged.perplexity_after == plain.perplexity_after
    assert outcome(tmp_path / "paged") == outcome(tmp_path / "plain")


def test_a_stopped_run_goes_on_with_other_memory_and_keeps_nothing_of_the_first(
    source: Path, plain: Reference, tmp_path: Path
) -> None:
    """All the way round: a block on the disk, a block in memory, and the last one on a disk elsewhere."""
    recipe: RecipeEntries = [DENSE, "sparsegpt"]
    elsewhere = {"activations": "disk", "spool": str(tmp_path / "spools")}
    for num_blocks, memory in enumerate(({"activations": "disk"}, {"activations": "host"}), start=1):
        begun = settings(source, tmp_path / "run", recipe, memory=memory)
        with pytest.raises(RunStopped, match=f"{num_blocks} of {NUM_BLOCKS} blocks are committed"):
            carry_out(begun, stop=committed(tmp_path / "run", num_blocks))
        assert not (tmp_path / "run" / "spool").exists()
    carry_out(settings(source, tmp_path / "run", recipe, memory=elsewhere))
    assert outcome(tmp_path / "run") == plain(recipe)
    assert list((tmp_path / "spools").iterdir()) == []


ALL = SEQUENCES
ONCE_MORE = NUM_BLOCKS * (ALL * EPOCHS)
"""Sequences that the method reads, while it learns, of each boundary it compares."""

TRAFFIC = [
    # Each boundary is written once and read once; the first target for the error.
    (["wanda"], "disk", NUM_BLOCKS * (ALL + 1), NUM_BLOCKS * (ALL + 1)),
    (["sparsegpt"], "disk", NUM_BLOCKS * (ALL + 1), NUM_BLOCKS * (ALL + 1)),
    # In memory, which costs nothing, blocks are not fused: all boundaries but the last are read twice.
    (["wanda"], "host", (2 * NUM_BLOCKS - 1) * ALL + NUM_BLOCKS, NUM_BLOCKS * (ALL + 1)),
    # All outputs of the dense block are kept as targets.
    ([BESA], "disk", NUM_BLOCKS * (ALL + 1) + 2 * ONCE_MORE, 2 * NUM_BLOCKS * ALL),
    ([BESA], "host", (2 * NUM_BLOCKS - 1) * ALL + NUM_BLOCKS + 2 * ONCE_MORE, 2 * NUM_BLOCKS * ALL),
    # The dense stream is a copy of the embedded sequences, and advances over every block, the last one too.
    ([DENSE], "disk", ALL + NUM_BLOCKS * (2 * ALL + 1) + 2 * ONCE_MORE, NUM_BLOCKS * ALL + (1 + NUM_BLOCKS) * ALL),
]
"""Recipe, tier, sequences read and sequences written."""


@pytest.mark.parametrize(("recipe", "tier", "num_read", "num_written"), TRAFFIC, ids=str)
def test_hidden_states_move_as_often_as_the_schedule_says(
    recipe: RecipeEntries, tier: str, num_read: int, num_written: int, source: Path, tmp_path: Path
) -> None:
    traffic = carry_out(settings(source, tmp_path, recipe, memory={"activations": tier})).traffic
    assert traffic["hidden_written"] == num_written * SEQUENCE_BYTES
    assert traffic["hidden_read"] == num_read * SEQUENCE_BYTES


def test_each_weight_of_a_block_is_read_once(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, ["wanda"], memory={"io": "threads"}))
    tensors = tensors_in(source)
    inside = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." in name)
    assert report.traffic["weights_read"] == inside


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the disk measured with a megabyte."""
    monkeypatch.setattr("pipeline.planning.pace.PROBED_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.planning.pace.HASHED_BYTES", 1 << 20)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("memory", "facts"),
    [
        (
            {"host": "1MiB"},
            [r"needs [\d.]+ [MG]B \(host\), [\d.]+ [MG]B above memory\.host: 1\.05 MB", r"memory\.host: \d+MiB"],
        ),
        (
            {"activations": "disk", "spool_limit": "16KiB"},
            [r"needs 28\.7 kB \(spool\), 12\.3 kB above memory\.spool_limit: 16\.4 kB", r"calibration\.sequences: 4"],
        ),
    ],
    ids=["host", "spool"],
)
@pytest.mark.usefixtures("quick_probes")
def test_a_ceiling_below_the_plan_is_refused_before_anything_is_written(
    memory: dict[str, Any],
    facts: list[str],
    command: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(settings(source, tmp_path / "run", ["wanda"], memory=memory)))
    with untouched(source):
        assert run_command([command, config], monkeypatch) == 3
    said = " ".join(capsys.readouterr().err.split())
    for fact in (*facts, "What would do: "):
        assert re.search(fact, said)
    assert {file for file in digests(tmp_path) if file != "run/lock"} == {"job.yaml"}
