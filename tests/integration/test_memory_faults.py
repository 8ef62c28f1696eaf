"""What befalls hidden states on disk, and the disk itself: a clear error, no block lost, and the same bytes after."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError, StorageError
from tests.integration.paged_runs import At, ends_as, num_committed, settings
from tests.integration.paged_runs import source as source
from tests.integration.paged_runs import undisturbed as undisturbed
from tests.integration.support import INDEX, carry_out


@pytest.mark.parametrize(("block", "phase"), [(2, "prune"), (1, "propagate")])
def test_a_spool_that_is_taken_away_stops_the_run_and_keeps_its_blocks(
    block: int, phase: str, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    gone = At(block, phase, lambda: shutil.rmtree(tmp_path / "spool"))
    with pytest.raises(StorageError, match=rf"{re.escape(str(tmp_path / 'spool'))}/\w+: No such file or directory"):
        carry_out(settings(source, tmp_path), gone)
    assert num_committed(tmp_path) == 2
    assert ends_as(undisturbed, settings(source, tmp_path))


def flip_byte(file: Path) -> None:
    with file.open("r+b") as content:
        byte = content.read(1)
        content.seek(0)
        content.write(bytes([byte[0] ^ 1]))


def test_a_hidden_state_that_changes_on_the_disk_is_noticed(
    source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    damaged = At(1, "prune", lambda: flip_byte(tmp_path / "spool" / "pruned"))
    with pytest.raises(StorageError, match=r"spool/pruned: sequence 0 .* came back with crc32 .*the disk is faulty"):
        carry_out(settings(source, tmp_path), damaged)
    assert num_committed(tmp_path) == 1
    assert ends_as(undisturbed, settings(source, tmp_path))


def shard_of_block(source: Path, index: int) -> Path:
    names: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    return source / names[f"model.layers.{index}.mlp.up_proj.weight"]


@contextmanager
def failing_reads(name: str, after: int) -> Iterator[None]:
    """Have the disk fail from some read of a file on, which is known by its name."""
    real, num_reads = os.preadv, 0

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal num_reads
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name == name:
            num_reads += 1
            if num_reads > after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield


@pytest.mark.parametrize("after", [0, 11, 20])
def test_hidden_states_that_cannot_be_read_stop_the_run(
    after: int, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    message = r"hidden states are lost: cannot read bytes [\d,]+ to [\d,]+ of .*/spool/pruned: Input/output error.*"
    with failing_reads("pruned", after), pytest.raises(StorageError, match=message + r"run again: it goes on"):
        carry_out(settings(source, tmp_path))
    assert ends_as(undisturbed, settings(source, tmp_path))


@pytest.mark.parametrize("after", [0, 2])
def test_weights_that_cannot_be_read_stop_the_run(
    after: int, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    shard = shard_of_block(source, 2)
    with failing_reads(shard.name, after), pytest.raises(CheckpointError, match=rf"cannot read .* of {shard}: Input/"):
        carry_out(settings(source, tmp_path))
    assert num_committed(tmp_path) <= 2
    assert ends_as(undisturbed, settings(source, tmp_path))
