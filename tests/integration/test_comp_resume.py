"""Runs that take neurons out of blocks end with the same bytes, however they are stopped and use memory."""

from pathlib import Path

import pytest
import torch

from tests.integration.endings import check_killed, check_memory, check_stopped
from tests.integration.narrow import NARROW, THEN_BESA, THEN_WANDA, UNEVEN, UNEVEN_THEN_WANDA, settings
from tests.integration.narrow import three_blocks as three_blocks
from tests.integration.support import RecipeEntries, write_text
from tests.tiny import save_tiny


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, THEN_BESA, ["wanda_sp"], UNEVEN_THEN_WANDA], ids=str)
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    recipe: RecipeEntries, stored: torch.dtype, compute: str, tmp_path: Path
) -> None:
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source", stored)
    check_stopped(settings(tmp_path / "source", tmp_path / "run", recipe, 0.3, compute={"dtype": compute}))


@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, UNEVEN], ids=str)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    recipe: RecipeEntries, source: Path, tmp_path: Path
) -> None:
    check_killed(settings(source, tmp_path / "run", recipe))


@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, UNEVEN_THEN_WANDA], ids=str)
def test_how_memory_is_used_changes_no_byte(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    check_memory(settings(source, tmp_path / "run", recipe))
