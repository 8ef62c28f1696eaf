"""Going on with a run directory: the same bytes when nothing changed, and a refusal by name when something did."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunDirectoryError, RunLocked, RunStopped, StorageError
from pipeline.ledger import Ledger
from pipeline.shards import hash_file
from tests.integration.processes import Child, hold, prune_with_small_files
from tests.integration.support import carry_out, committed, job, outcome, write_text
from tests.tiny import save_tiny

BESA_DENSE = {"besa": {"target": "dense"}}
TUNED = {"reconstruct": {"epochs": 1, "norms": True}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source, its text, and an undisturbed run."""
    base = tmp_path_factory.mktemp("resume")
    write_text(base)
    save_tiny("llama", base / "source")
    carry_out(job(base / "source", base / "undisturbed"))
    return base


@pytest.fixture(scope="module")
def undisturbed(shared: Path) -> dict[str, Any]:
    return outcome(shared / "undisturbed")


@pytest.fixture
def settings(shared: Path, tmp_path: Path) -> dict[str, Any]:
    """The undisturbed run's settings, for a run directory of the test's own."""
    return job(shared / "source", tmp_path / "run")


def stop_after(settings: dict[str, Any], num_blocks: int) -> Path:
    """Run until so many blocks are committed; return the run directory."""
    run_directory = Path(settings["output"])
    facts = f"{num_blocks} of 3 blocks are committed in {run_directory}. Go on with: secateur run {run_directory}"
    with pytest.raises(RunStopped, match=re.escape(facts)):
        carry_out(settings, stop=committed(run_directory, num_blocks))
    return run_directory


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [["wanda"], [BESA_DENSE], [BESA_DENSE, "sparsegpt"], ["wanda", TUNED]], ids=str)
def test_a_run_stopped_at_every_block_ends_with_the_same_bytes(
    recipe: list[Any], stored: torch.dtype, compute: str, tmp_path: Path
) -> None:
    write_text(tmp_path)
    save_tiny("gpt2", tmp_path / "source", stored)
    one, many = (
        job(tmp_path / "source", tmp_path / name, recipe, 0.55, compute={"dtype": compute}) for name in ("one", "many")
    )
    report = carry_out(one)
    for num_blocks in (1, 2, 3):
        stop_after(many, num_blocks)
    resumed = carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")
    assert (resumed.mean_error, resumed.perplexity_after) == (report.mean_error, report.perplexity_after)


def test_a_stopped_run_has_nothing_that_loads(settings: dict[str, Any]) -> None:
    model = stop_after(settings, 2) / "model"
    assert sorted(path.name for path in model.iterdir()) == [f"model-0000{n}-of-00004.safetensors" for n in (2, 3)]


def test_only_one_process_works_in_a_run_directory(settings: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    run_directory = Path(settings["output"])
    with Child(hold, run_directory) as other:
        assert other.wait_for_report() == "held"
        with pytest.raises(RunLocked, match=rf"in use by process {other.process.pid} on host .* wait for it, stop it"):
            carry_out(settings)
    carry_out(settings)  # the lock died with its holder
    assert outcome(run_directory) == undisturbed


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink], ids=["altered", "removed"])
def test_a_shard_that_is_no_longer_what_was_committed_is_refused(
    damage: Any, settings: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    shard = stop_after(settings, 2) / "model" / "model-00002-of-00004.safetensors"
    content = shard.read_bytes()
    damage(shard)
    with pytest.raises(RunDirectoryError, match=r"00002-of.* is not the shard that block 0 committed .* Restore it"):
        carry_out(settings)
    shard.write_bytes(content)
    carry_out(settings)
    assert outcome(shard.parents[1]) == undisturbed


def test_what_a_killed_write_has_left_is_removed(settings: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    run_directory = stop_after(settings, 2)
    (run_directory / "report").mkdir()
    leftovers = [
        run_directory / "model" / ".model-00004-of-00004.safetensors.0123abcd.tmp",
        run_directory / "model" / ".model.safetensors.index.json.0123abcd.tmp",
        run_directory / ".config.yaml.0123abcd.tmp",
        run_directory / "report" / ".report.json.0123abcd.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    carry_out(settings)
    assert [path.name for path in leftovers if path.exists()] == []
    assert outcome(run_directory) == undisturbed


def test_a_full_disk_during_a_blocks_shard_commits_nothing_and_costs_nothing(
    settings: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    run_directory = Path(settings["output"])
    with Child(prune_with_small_files, settings, 20_000) as child:
        assert child.wait_for_report() == "begun"
        kind, message = child.wait_for_report()
    assert kind == StorageError.__name__
    assert "model-00002-of-00004.safetensors: File too large. It needs 31," in message
    assert "free space or make the directory writable, then run again" in message
    assert Ledger.read(run_directory).commits == {}
    assert list((run_directory / "model").iterdir()) == []
    carry_out(settings)
    assert outcome(run_directory) == undisturbed


def test_a_full_disk_while_the_small_files_are_copied_is_no_crash(tmp_path: Path) -> None:
    """tokenizer.json is the largest of them: with real models some 10 MB."""
    write_text(tmp_path)
    save_tiny("llama", tmp_path / "source")
    tokenizer = tmp_path / "source" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " " * 100_000)
    settings = job(tmp_path / "source", tmp_path / "run")
    with Child(prune_with_small_files, settings, 50_000) as child:
        assert child.wait_for_report() == "begun"
        kind, message = child.wait_for_report()
    assert kind == StorageError.__name__
    assert "tokenizer.json" in message
    assert not (tmp_path / "run" / "model" / "model.safetensors.index.json").exists()
    carry_out(settings)
    assert hash_file(tmp_path / "run" / "model" / "tokenizer.json") == hash_file(tokenizer)
