"""The probes: what they move is moved for real, and nothing is left behind."""

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.paging.pager import ALIGNMENT, Transfer
from pipeline.planning.probes import NUM_PIECES, PIECE_BYTES, copy_speed, disk_speed, matmul_flops
from tests.pipeline.paging.engines import ENGINES, Open

CPU = torch.device("cpu")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_bytes", [100_000, 2 * NUM_PIECES * PIECE_BYTES])
def test_a_disk_is_measured_and_left_as_it_was(engine: Open, num_bytes: int, tmp_path: Path) -> None:
    with closing(engine(tmp_path)) as pager:
        moved: dict[str, list[tuple[int, int]]] = {"write": [], "read": []}
        for name, move in (("write", pager.write), ("read", pager.read)):

            def counted(path: Path, offset: int, buffer: torch.Tensor, name: str = name, move=move) -> Transfer:  # type: ignore[no-untyped-def]
                moved[name].append((offset, len(buffer)))
                return move(path, offset, buffer)

            setattr(pager, name, counted)
        write, read = disk_speed(tmp_path, pager, num_bytes)
    assert write > 0
    assert read > 0
    assert moved["write"] == moved["read"]
    assert sum(size for _, size in moved["read"]) == -(-num_bytes // ALIGNMENT) * ALIGNMENT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_is_told_and_the_file_removed(
    engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(engine(tmp_path)) as pager:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device"):
            disk_speed(tmp_path, pager, ALIGNMENT)
    assert list(tmp_path.iterdir()) == []


def test_arithmetic_and_copies_have_a_speed() -> None:
    assert matmul_flops(CPU, torch.float32, 16) > 0
    assert copy_speed(CPU) > 0


def test_a_device_that_cannot_multiply_is_an_error() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        matmul_flops(torch.device("meta"), torch.float32, 16)
