"""Runs that take neurons out of blocks end with the same bytes, however they are stopped and use memory."""

import signal
from pathlib import Path

import pytest
import torch

from pipeline.errors import RunStopped
from pipeline.verify import verify
from tests.integration.narrow import NARROW, THEN_BESA, THEN_WANDA, UNEVEN, UNEVEN_THEN_WANDA, settings
from tests.integration.processes import Child, prune_until_write
from tests.integration.support import SILENT, RecipeEntries, carry_out, committed, outcome, write_text
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("comp")
    write_text(base)
    save_tiny("llama", base / "source", torch.bfloat16)
    return base / "source"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, THEN_BESA, ["wanda_sp"], UNEVEN_THEN_WANDA], ids=str)
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    recipe: RecipeEntries, stored: torch.dtype, compute: str, tmp_path: Path
) -> None:
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source", stored)
    one, many = (
        settings(tmp_path / "source", tmp_path / name, recipe, 0.3, compute={"dtype": compute})
        for name in ("one", "many")
    )
    carry_out(one)
    for num_blocks in (1, 2):
        with pytest.raises(RunStopped):
            carry_out(many, stop=committed(tmp_path / "many", num_blocks))
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")
    verify(tmp_path / "many", tmp_path / "source", SILENT)


@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, UNEVEN], ids=str)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    recipe: RecipeEntries, source: Path, tmp_path: Path
) -> None:
    one, many = (settings(source, tmp_path / name, recipe) for name in ("one", "many"))
    carry_out(one)
    for deadly in (5, 17, 29):
        with Child(prune_until_write, many, deadly) as child:
            child.wait_for_report()
            assert child.exit_status() == -signal.SIGKILL
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


@pytest.mark.parametrize("recipe", [NARROW, THEN_WANDA, UNEVEN_THEN_WANDA], ids=str)
def test_how_memory_is_used_changes_no_byte(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    settings_of = {
        "plain": {},
        "disk": {"activations": "disk", "spool": str(tmp_path / "spool")},
        "little": {"activations": "host", "host": "2GiB"},
    }
    for name, memory in settings_of.items():
        carry_out(settings(source, tmp_path / name, recipe, memory=memory))
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "plain") == outcome(tmp_path / "little")
