"""What every I/O engine promises, held by both of them; and how the threads meet a disk that fails."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, StorageError
from pipeline.paging import pager as paging
from pipeline.paging.pager import ALIGNMENT, Pager, ThreadPager, aligned
from tests.pipeline.paging.engines import ENGINES, Open, content, fill, random_bytes

MIB = 1 << 20


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Open:
    return request.param


@pytest.fixture(scope="module")
def pager(engine: Open, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pager]:
    with closing(engine(tmp_path_factory.mktemp("engine"))) as pager:
        yield pager


def made(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_sizes_are_rounded_up(num_bytes: int, expected: int) -> None:
    assert aligned(num_bytes) == expected


def test_a_buffer_is_whole_pages_on_a_page(pager: Pager) -> None:
    buffer = pager.buffer(5000)
    assert (buffer.dtype, tuple(buffer.shape)) == (torch.uint8, (2 * ALIGNMENT,))
    assert buffer.data_ptr() % ALIGNMENT == 0
    pager.drop_buffer(buffer)
    assert buffer.fill_(7).sum() == 7 * 2 * ALIGNMENT  # whoever still holds it holds memory


@pytest.mark.parametrize("num_bytes", [ALIGNMENT, MIB - ALIGNMENT, MIB, MIB + ALIGNMENT, 9 * MIB])
def test_what_is_written_comes_back_from_any_offset(pager: Pager, tmp_path: Path, num_bytes: int) -> None:
    before = random_bytes(num_bytes + 4 * ALIGNMENT, 1)
    path, data = made(tmp_path / "file", before), random_bytes(num_bytes, 2)
    buffer = fill(pager.buffer(num_bytes), data)
    pager.write(path, ALIGNMENT, buffer).wait()
    assert path.read_bytes() == before[:ALIGNMENT] + data + before[ALIGNMENT + num_bytes :]
    pager.read(path, 3 * ALIGNMENT, buffer).wait()
    assert content(buffer) == path.read_bytes()[3 * ALIGNMENT : 3 * ALIGNMENT + num_bytes]
    pager.drop_buffer(buffer)


def test_many_transfers_are_in_flight_at_once_into_slices_of_one_buffer(pager: Pager, tmp_path: Path) -> None:
    data = random_bytes(100 * ALIGNMENT)
    path, buffer = made(tmp_path / "file", data), pager.buffer(len(data))
    slices = [slice(start, start + ALIGNMENT) for start in range(0, len(data), ALIGNMENT)]
    transfers = [pager.read(path, part.start, buffer[part]) for part in reversed(slices)]
    for transfer in transfers:
        transfer.wait()
        transfer.wait()  # as often as one likes
    assert content(buffer) == data
    pager.drop_buffer(buffer)


@pytest.mark.parametrize("num_bytes", [1, ALIGNMENT - 1, 5 * ALIGNMENT + 12, MIB + 8])
def test_a_read_may_reach_to_the_end_of_the_last_page(pager: Pager, tmp_path: Path, num_bytes: int) -> None:
    data = random_bytes(num_bytes)
    buffer = pager.buffer(num_bytes).fill_(1)
    pager.read(made(tmp_path / "file", data), 0, buffer).wait()
    assert content(buffer[:num_bytes]) == data
    pager.drop_buffer(buffer)


def test_a_read_beyond_the_last_page_is_refused_with_numbers(pager: Pager, tmp_path: Path) -> None:
    path, buffer = made(tmp_path / "file", random_bytes(5000)), pager.buffer(3 * ALIGNMENT)
    transfer = pager.read(path, 0, buffer)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"cannot read bytes 0 to 12,288 of .*/file: the file has 5,000 bytes"
        ):
            transfer.wait()


def test_a_file_that_shrank_is_an_error(pager: Pager, tmp_path: Path) -> None:
    path, buffer = made(tmp_path / "file", random_bytes(4 * ALIGNMENT)), pager.buffer(4 * ALIGNMENT)
    pager.read(path, 0, buffer).wait()
    os.truncate(path, ALIGNMENT)
    with pytest.raises(CheckpointError, match="the file has 4,096 bytes; the file must be whole"):
        pager.read(path, 0, buffer).wait()
    with pytest.raises(StorageError, match="the file has 4,096 bytes; something has shortened it"):
        pager.write(path, 0, buffer).wait()
    assert path.stat().st_size == ALIGNMENT


def test_a_missing_file_is_neither_read_nor_made(pager: Pager, tmp_path: Path) -> None:
    buffer = pager.buffer(ALIGNMENT)
    with pytest.raises(CheckpointError, match=r"of .*/none: No such file or directory"):
        pager.read(tmp_path / "none", 0, buffer).wait()
    with pytest.raises(StorageError, match=r"of .*/none: No such file or directory; make the directory writable"):
        pager.write(tmp_path / "none", 0, buffer).wait()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_named(pager: Pager, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot write bytes 0 to 4,096 of {tmp_path}: Is a directory"):
        pager.write(tmp_path, 0, pager.buffer(ALIGNMENT)).wait()


def test_a_misaligned_request_is_refused_at_once(pager: Pager, tmp_path: Path) -> None:
    path, buffer = made(tmp_path / "file", random_bytes(4 * ALIGNMENT)), pager.buffer(2 * ALIGNMENT)
    rule = f"must be multiples of {ALIGNMENT}"
    with pytest.raises(ValueError, match=rule):
        pager.read(path, 512, buffer)
    with pytest.raises(ValueError, match=rule):
        pager.write(path, 0, buffer[:512])
    with pytest.raises(ValueError, match=rule):
        pager.read(path, 0, buffer[512 : 512 + ALIGNMENT])
    with pytest.raises(ValueError, match=r"flat uint8 host buffers, not torch\.float32"):
        pager.read(path, 0, buffer.view(torch.float32))


def test_closing_waits_for_what_is_in_flight(engine: Open, tmp_path: Path) -> None:
    data = random_bytes(16 * MIB)
    path, pager = made(tmp_path / "file", bytes(len(data))), engine(tmp_path)
    buffer = fill(pager.buffer(len(data)), data)
    pager.write(path, 0, buffer)
    pager.close()
    assert path.read_bytes() == data
    assert content(buffer) == data


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, 12), st.integers(1, 12), st.integers(0, 99)), min_size=1, max_size=12
    )
)
def test_any_reads_and_writes_are_those_of_a_file_in_memory(
    pager: Pager, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, int, int]]
) -> None:
    model = bytearray(random_bytes(24 * ALIGNMENT))
    path = made(tmp_path_factory.mktemp("model") / "file", bytes(model))
    buffer = pager.buffer(12 * ALIGNMENT)
    for is_write, page, num_pages, seed in steps:
        span, part = slice(page * ALIGNMENT, (page + num_pages) * ALIGNMENT), buffer[: num_pages * ALIGNMENT]
        if is_write:
            model[span] = random_bytes(len(part), seed)
            pager.write(path, span.start, fill(part, model[span])).wait()
        else:
            pager.read(path, span.start, part).wait()
            assert content(part) == model[span]
    assert path.read_bytes() == model
    pager.drop_buffer(buffer)


@pytest.fixture
def threads() -> Iterator[ThreadPager]:
    with closing(ThreadPager()) as pager:
        yield pager


def test_a_disk_error_is_named(threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "pwritev", broken)
    path, buffer = made(tmp_path / "file", random_bytes(2 * ALIGNMENT)), threads.buffer(ALIGNMENT)
    with pytest.raises(CheckpointError, match=r"cannot read bytes 4,096 to 8,192 of .*/file: Input/output error"):
        threads.read(path, ALIGNMENT, buffer).wait()
    with pytest.raises(StorageError, match=r"cannot write bytes 0 to 4,096 of .*/file: Input/output error"):
        threads.write(path, 0, buffer).wait()


def test_an_error_is_told_only_when_nothing_touches_the_buffer_any_more(
    threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "THREAD_BYTES", ALIGNMENT)
    path, buffer, preadv = (
        made(tmp_path / "file", random_bytes(8 * ALIGNMENT)),
        threads.buffer(8 * ALIGNMENT),
        os.preadv,
    )

    def first_fails(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", first_fails)
    with pytest.raises(CheckpointError, match="bytes 0 to 4,096"):
        threads.read(path, 0, buffer).wait()
    assert content(buffer[ALIGNMENT:]) == path.read_bytes()[ALIGNMENT:]


def test_a_file_that_ends_while_it_is_read_is_an_error(
    threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(CheckpointError, match="the file became shorter meanwhile"):
        threads.read(made(tmp_path / "file", random_bytes(ALIGNMENT)), 0, threads.buffer(ALIGNMENT)).wait()


def test_calls_that_move_a_part_are_repeated(
    threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev, data = os.preadv, os.pwritev, random_bytes(4 * ALIGNMENT)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:ALIGNMENT]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:ALIGNMENT]], offset))
    path, buffer = made(tmp_path / "file", bytes(len(data))), fill(threads.buffer(len(data)), data)
    threads.write(path, 0, buffer).wait()
    threads.read(path, 0, buffer.zero_()).wait()
    assert content(buffer) == path.read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
@pytest.mark.parametrize("refused", ["the flag", "the call"])
def test_where_direct_io_is_refused_the_page_cache_serves_and_is_told_to_forget(
    threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    import fcntl

    forgotten, control, preadv, pwritev = [], fcntl.fcntl, os.preadv, os.pwritev

    def no_flag(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(fd, command, flags)

    def refusing(call):  # type: ignore[no-untyped-def]
        def called(fd: int, buffers: list[memoryview], offset: int) -> int:
            if control(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(fd, buffers, offset)

        return called

    if refused == "the flag":
        monkeypatch.setattr(fcntl, "fcntl", no_flag)
    else:
        monkeypatch.setattr(os, "preadv", refusing(preadv))
        monkeypatch.setattr(os, "pwritev", refusing(pwritev))
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, length, advice: forgotten.append((start, length, advice))
    )
    data = random_bytes(2 * ALIGNMENT)
    path, buffer = made(tmp_path / "file", bytes(len(data))), fill(threads.buffer(len(data)), data)
    threads.write(path, 0, buffer).wait()
    threads.read(path, 0, buffer.zero_()).wait()
    assert content(buffer) == data
    assert forgotten == [(0, len(data), os.POSIX_FADV_DONTNEED)] * 2


def test_another_refusal_of_direct_io_is_an_error(
    threads: ThreadPager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refused(fd: int, command: int, flags: int = 0) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    with pytest.raises(CheckpointError, match="Operation not permitted"):
        threads.read(made(tmp_path / "file", random_bytes(ALIGNMENT)), 0, threads.buffer(ALIGNMENT)).wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pinned_buffer_is_pinned() -> None:
    with closing(ThreadPager(pinned=True)) as pager:
        assert pager.buffer(3 * ALIGNMENT).is_pinned()
