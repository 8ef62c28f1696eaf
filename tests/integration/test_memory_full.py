"""A spool without room, real disks among them: said before or when it happens, and the run goes on once there is."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BudgetExceeded, StorageError
from tests.integration.paged_runs import DISK, NUM_BLOCKS, AfterTask, ends_as, num_committed, settings
from tests.integration.paged_runs import source as source
from tests.integration.paged_runs import undisturbed as undisturbed
from tests.integration.processes import Child, prune_until_spooled
from tests.integration.support import carry_out, outcome


def test_a_spool_limit_that_is_too_low_is_refused_with_numbers(
    source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    limited = settings(source, tmp_path, memory={**DISK, "spool_limit": "36KiB"})
    numbers = r"needs 41 kB \(spool\), 4\.1 kB above memory\.spool_limit: 36\.9 kB"
    with pytest.raises(BudgetExceeded, match=rf"{numbers}.* What would do: .*calibration\.sequences: 4"):
        carry_out(limited)
    assert ends_as(undisturbed, settings(source, tmp_path, memory={**DISK, "spool_limit": "40KiB"}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "secateur-test", str(directory)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, check=False, capture_output=True).returncode
    ):
        pytest.skip("only root may mount a small disk here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    free = shutil.disk_usage(disk).free
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)


def evaluated(settings: dict[str, Any]) -> dict[str, Any]:
    text = settings["calibration"]["source"]["text"]
    return {**settings, "evaluate": {"text": text, "sequence_length": 20, "windows": 5}}


def test_a_full_disk_is_refused_by_the_plan(
    small_disk: Path, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    begun = settings(source, tmp_path / "run", memory={**DISK, "spool": str(small_disk)})
    fill(small_disk)
    with pytest.raises(BudgetExceeded, match=r"needs 41 kB \(spool\), 41 kB above all that this machine has free"):
        carry_out(begun)
    (small_disk / "filler").unlink()
    assert ends_as(undisturbed, begun)


def test_what_a_killed_run_has_left_does_not_take_the_room_it_needs(
    small_disk: Path, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    begun = settings(source, tmp_path / "run", memory={**DISK, "spool": str(small_disk)})
    with Child(prune_until_spooled, begun, 20) as child:
        assert child.exit_status() == -signal.SIGKILL
    assert [path.name for path in small_disk.glob("*/*")]
    fill(small_disk)
    carry_out(begun)
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("task", "boundary", "num_blocks"), [(1, "pruned", 0), (2, "evaluated", NUM_BLOCKS)])
def test_a_disk_that_becomes_full_stops_the_run_where_it_can_go_on(
    task: int,
    boundary: str,
    num_blocks: int,
    small_disk: Path,
    source: Path,
    tmp_path: Path,
) -> None:
    """After the first evaluation, or once all blocks are pruned; between, the run has all the room it needs."""
    begun = evaluated(settings(source, tmp_path / "run", memory={**DISK, "spool": str(small_disk)}))
    message = (
        rf"cannot make room for {boundary} in the spool {small_disk}/secateur-\w+: No space left on device\. It needs"
    )
    with pytest.raises(StorageError, match=message):
        carry_out(begun, AfterTask(task, lambda: fill(small_disk)))
    assert num_committed(tmp_path / "run") == num_blocks
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    carry_out(begun)
    carry_out(evaluated(settings(source, tmp_path / "other", memory={})))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")
    assert list(small_disk.iterdir()) == []
