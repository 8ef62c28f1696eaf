"""DeepSpeed's op under watch: what it does not say is found out, and what would end the process does not happen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.paging import aio, aio_op
from pipeline.paging.aio import BLOCK_BYTES, AioPager
from pipeline.paging.pager import ALIGNMENT
from tests.pipeline.paging.engines import content, fill, needs_aio, random_bytes

pytestmark = needs_aio
ROOT = Path(__file__).parents[3]


@pytest.fixture
def pager(tmp_path: Path) -> Iterator[AioPager]:
    with closing(AioPager(tmp_path)) as pager:
        yield pager


class FailingHandle:
    """Reads as the op does when the disk fails: the failing block never comes, and nothing is said."""

    def __init__(self, fails: slice) -> None:
        self.fails = fails

    def pread(self, buffer: torch.Tensor, path: str, validate: bool, is_async: bool, offset: int) -> int:
        before = buffer[self.fails].clone()
        with open(path, "rb") as file:
            file.seek(offset)
            fill(buffer, file.read(len(buffer)))
        buffer[self.fails] = before
        return 0

    def wait(self) -> int:
        return 1


@pytest.mark.parametrize(
    "fails",
    [
        slice(0, BLOCK_BYTES),
        slice(BLOCK_BYTES, 2 * BLOCK_BYTES),
        slice(2 * BLOCK_BYTES, 2 * BLOCK_BYTES + ALIGNMENT),
        slice(BLOCK_BYTES // 2, BLOCK_BYTES),
    ],
    ids=["the first", "a middle one", "the last, short", "a half"],
)
def test_a_block_that_never_came_is_found_out(pager: AioPager, tmp_path: Path, fails: slice) -> None:
    path, buffer = tmp_path / "file", pager.buffer(2 * BLOCK_BYTES + ALIGNMENT)
    path.write_bytes(random_bytes(len(buffer)))
    pager._idle.append(FailingHandle(fails))
    with pytest.raises(CheckpointError, match=r"bytes 0 to 2,101,248 of .*/file: the disk or the file system failed"):
        pager.read(path, 0, buffer).wait()
    pager._idle.clear()
    pager.read(path, 0, buffer).wait()
    assert content(buffer) == path.read_bytes()


def test_a_file_that_cannot_be_opened_directly_is_named(pager: AioPager, tmp_path: Path) -> None:
    class Refused:
        def pread(self, *_: object) -> int:
            return -1

    (tmp_path / "file").write_bytes(random_bytes(ALIGNMENT))
    pager._idle.append(Refused())
    with pytest.raises(CheckpointError, match="it cannot be opened for direct I/O"):
        pager.read(tmp_path / "file", 0, pager.buffer(ALIGNMENT)).wait()


def test_a_tail_that_is_gone_is_an_error(pager: AioPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(random_bytes(ALIGNMENT + 10))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 3)
    with pytest.raises(CheckpointError, match="the file became shorter meanwhile"):
        pager.read(tmp_path / "file", 0, pager.buffer(ALIGNMENT + 10)).wait()


def test_when_all_handles_are_busy_the_first_transfer_is_waited_for(
    pager: AioPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "NUM_HANDLES", 2)
    path, data = tmp_path / "file", random_bytes(9 * ALIGNMENT)
    path.write_bytes(data)
    buffer = pager.buffer(len(data))
    starts = range(0, len(data), ALIGNMENT)
    transfers = [pager.read(path, start, buffer[start : start + ALIGNMENT]) for start in starts]
    assert len(pager._under_way) <= 2
    assert pager._num_handles == 2
    for transfer in transfers:
        transfer.wait()
    assert content(buffer) == data


def test_an_error_of_a_transfer_that_was_waited_for_by_the_way_is_kept(pager: AioPager, tmp_path: Path) -> None:
    path, buffer = tmp_path / "file", pager.buffer(ALIGNMENT)
    path.write_bytes(random_bytes(ALIGNMENT))
    pager._idle.append(FailingHandle(slice(0, ALIGNMENT)))
    transfer = pager.read(path, 0, buffer)
    pager.close()
    with pytest.raises(CheckpointError, match="a part never came"):
        transfer.wait()


def test_a_buffer_from_elsewhere_is_refused(pager: AioPager, tmp_path: Path) -> None:
    from pipeline.paging.pager import host_buffer

    with pytest.raises(ValueError, match="aio moves buffers of its pager only"):
        pager.read(tmp_path / "file", 0, host_buffer(ALIGNMENT, pinned=False))


def test_where_it_does_not_work_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=f"DeepSpeed's aio does not work in {tmp_path}/none: .*No such file"):
        AioPager(tmp_path / "none")
    monkeypatch.setattr(AioPager, "_start_write", lambda self, span: lambda: None)
    with pytest.raises(StorageError, match="what was written did not come back"):
        AioPager(tmp_path)


def test_a_library_that_does_not_load_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libaio.so.1: cannot open shared object file")

    monkeypatch.setattr(aio, "load", broken)
    with pytest.raises(StorageError, match=r"cannot be loaded \(libaio.so.1: .*\); run `secateur doctor --build`"):
        AioPager(tmp_path)


def test_nothing_of_deepspeed_is_imported_or_heard(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from pipeline.paging.aio import AioPager
pager = AioPager(Path({str(tmp_path)!r}))
pager.close()
assert not [name for name in sys.modules if name.startswith("deepspeed")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_memory_goes_back_when_its_last_view_does(pager: AioPager) -> None:
    buffer = pager.buffer(ALIGNMENT)
    address, view = buffer.data_ptr(), buffer[:8].view(torch.int64)
    pager.drop_buffer(buffer)
    del buffer
    assert aio_op.load().pins.is_pinned(view)
    del view
    assert not aio_op.load().pins.free_cpu_locked_tensor_by_ptr(address)
