"""Runs that take heads out of attentions end with the same bytes, however they are stopped and use memory."""

from pathlib import Path

import pytest
import torch

from tests.heads import families_with_heads
from tests.integration.endings import check_killed, check_memory, check_stopped
from tests.integration.headless import GROUPS, QUERIES, THEN_WANDA
from tests.integration.narrow import settings
from tests.integration.support import RecipeEntries, write_text
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
    check_stopped(settings(base / family, tmp_path / "run", recipe, 0.35, compute={"dtype": compute}))


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(within_block: str, base: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "within_block": within_block}
    check_killed(settings(base / "h-llama-wide", tmp_path / "run", [], prune=prune))


def test_how_memory_is_used_changes_no_byte(base: Path, tmp_path: Path) -> None:
    prune = {"recipe": THEN_WANDA, "sparsity": 0.5, "within_block": "sequential"}
    check_memory(settings(base / "h-llama-wide", tmp_path / "run", [], prune=prune))
