"""Scratch directories: gone when their worker is done, and, where it was killed, when the next one begins."""

import signal
import subprocess
import sys
from pathlib import Path

from cluster.shelves import PREFIX, own_directory

KILLED = """
import os, signal, sys
from pathlib import Path
from cluster.shelves import own_directory
with own_directory(Path(sys.argv[1])) as directory:
    (directory / "half a shard").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_scratch_directory_is_gone_once_it_is_not_needed(tmp_path: Path) -> None:
    with own_directory(tmp_path) as directory:
        (directory / "shard").write_bytes(b"bytes")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_worker_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    status = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[2]).returncode
    assert status == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "half a shard").exists()
    with own_directory(tmp_path) as directory:
        assert list(tmp_path.iterdir()) == [directory]


def test_what_others_use_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    foreign = tmp_path / f"{PREFIX}notes"
    foreign.mkdir()
    with own_directory(tmp_path) as one, own_directory(tmp_path) as other:
        assert set(tmp_path.iterdir()) == {one, other, foreign}
