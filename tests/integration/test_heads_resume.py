"""Runs that take heads out of attentions end with the same bytes, however they are stopped and use memory."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunStopped
from pipeline.verify import verify
from tests.heads import families_with_heads
from tests.integration.headless import GROUPS, QUERIES, THEN_WANDA
from tests.integration.narrow import settings
from tests.integration.processes import Child, prune_until_write
from tests.integration.support import SILENT, RecipeEntries, carry_out, committed, outcome, write_text
from tests.tiny import save_tiny

THEN_BESA: RecipeEntries = [{"comp": {"ratio": 0.4, "heads": 0.25, "recovery": "lstsq"}}, {"besa": {"target": "dense"}}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("heads")
    write_text(base)
    with families_with_heads():
        for family in ("h-llama-wide", "h-phi3"):
            save_tiny(family, base / family, torch.bfloat16)
        save_tiny("h-qwen2", base / "h-qwen2", torch.float32)  # computed in bfloat16, its stored bits are read again
    return base


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("h-llama-wide", GROUPS), ("h-llama-wide", THEN_WANDA), ("h-llama-wide", THEN_BESA), ("h-phi3", GROUPS),
        ("h-qwen2", QUERIES),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    family: str, recipe: RecipeEntries, compute: str, base: Path, tmp_path: Path
) -> None:
    one, many = (
        settings(base / family, tmp_path / name, recipe, 0.35, compute={"dtype": compute}) for name in ("one", "many")
    )
    carry_out(one)
    for num_blocks in (1, 2):
        with pytest.raises(RunStopped):
            carry_out(many, stop=committed(tmp_path / "many", num_blocks))
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")
    verify(tmp_path / "many", base / family, SILENT)


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(within_block: str, base: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "within_block": within_block}
    one, many = (settings(base / "h-llama-wide", tmp_path / name, [], prune=prune) for name in ("one", "many"))
    carry_out(one)
    for deadly in (5, 17, 29):
        with Child(prune_until_write, many, deadly) as child:
            child.wait_for_report()
            assert child.exit_status() == -signal.SIGKILL
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


def test_how_memory_is_used_changes_no_byte(base: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "within_block": "sequential"}
    settings_of: dict[str, dict[str, Any]] = {
        "plain": {},
        "disk": {"activations": "disk", "spool": str(tmp_path / "spool")},
        "little": {"activations": "host", "host": "2GiB"},
    }
    for name, memory in settings_of.items():
        carry_out(settings(base / "h-llama-wide", tmp_path / name, [], prune=prune, memory=memory))
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "plain") == outcome(tmp_path / "little")
