"""Hidden states on disk: transfers overlap with what comes next, and no fault goes unseen or leaves anything behind."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from pipeline.errors import StorageError
from pipeline.paging.disk_region import DiskRegion
from tests.stores import CPU, ENGINES, Disk, HeldPager, RefusingPager, disk

SHAPE = (8, 4, 1024)
HIDDEN_NTD = torch.randn(SHAPE, generator=torch.manual_seed(0))
STRIDE = 4 * 1024 * 4
BATCHES = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
OFFSETS = [batch.start * STRIDE for batch in BATCHES]


@pytest.fixture(params=ENGINES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path, request.param) as opened:
        yield opened


def region_on(place: Disk, pager: HeldPager | None = None) -> DiskRegion:
    return DiskRegion(
        "pruned", SHAPE, torch.float32,
        spool=place.spool, pager=pager or place.pager, budget=place.budget, slot_sequences=2,
    )  # fmt: skip


def filled(place: Disk) -> DiskRegion:
    region = region_on(place)
    region.write(slice(0, 8), HIDDEN_NTD)
    region.flush()
    return region


def nothing_held(place: Disk) -> bool:
    return place.files() == [] and place.budget.held("host") == place.budget.held("spool") == 0


def test_the_next_batches_are_on_their_way_while_one_is_worked_on(place: Disk) -> None:
    pager = HeldPager(place.pager)
    with closing(region_on(place, pager)) as region:
        region.write(slice(0, 8), HIDDEN_NTD)
        region.flush()
        assert {pager.next_begun() for _ in BATCHES} == {("write", offset) for offset in OFFSETS}
        pager.hold("read", OFFSETS[1])
        pager.hold("read", OFFSETS[2])
        region.expect(BATCHES)
        assert {pager.next_begun(), pager.next_begun()} == {("read", OFFSETS[0]), ("read", OFFSETS[1])}
        assert torch.equal(region.read(BATCHES[0], CPU), HIDDEN_NTD[BATCHES[0]])
        assert pager.next_begun() == ("read", OFFSETS[2]), "the emptied buffer is filled again, whoever still reads"
        for offset in OFFSETS[1:3]:
            pager.let_go("read", offset)
        for batch in BATCHES[1:]:
            assert torch.equal(region.read(batch, CPU), HIDDEN_NTD[batch])
        assert region.waited > 0


def test_a_write_returns_before_it_is_done_and_a_third_waits_for_the_first(place: Disk) -> None:
    pager, done = HeldPager(place.pager), Event()
    with closing(region_on(place, pager)) as region:
        pager.hold("write", OFFSETS[0])
        pager.hold("write", OFFSETS[1])
        region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
        region.write(BATCHES[1], HIDDEN_NTD[BATCHES[1]])
        thread = Thread(target=lambda: (region.write(BATCHES[2], HIDDEN_NTD[BATCHES[2]]), done.set()))
        thread.start()
        assert not done.wait(0.05)
        pager.let_go("write", OFFSETS[0])
        thread.join(10)
        assert done.is_set()
        pager.let_go("write", OFFSETS[1])
        assert torch.equal(region.read(slice(0, 6), CPU), HIDDEN_NTD[:6])


@pytest.mark.parametrize("announced", [True, False])
def test_what_is_still_being_written_is_read_after_it_is_there(place: Disk, announced: bool) -> None:
    pager, read = HeldPager(place.pager), []
    with closing(region_on(place, pager)) as region:
        region.write(slice(0, 8), HIDDEN_NTD)
        region.flush()
        pager.hold("write", OFFSETS[0])
        region.write(BATCHES[0], -HIDDEN_NTD[BATCHES[0]])
        if announced:
            region.expect(BATCHES)
        thread = Thread(target=lambda: read.append(region.read(slice(0, 4), CPU)))
        thread.start()
        thread.join(0.05)
        assert not read
        pager.let_go("write", OFFSETS[0])
        thread.join(10)
    assert torch.equal(read[0], torch.cat([-HIDDEN_NTD[:2], HIDDEN_NTD[2:4]]))


def test_of_two_writes_the_later_one_stays(place: Disk) -> None:
    pager = HeldPager(place.pager)
    with closing(region_on(place, pager)) as region:
        pager.hold("write", OFFSETS[0])
        region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
        assert pager.next_begun() == ("write", OFFSETS[0])
        region.write(slice(1, 2), -HIDDEN_NTD[1:2])
        assert pager.none_begins()
        pager.let_go("write", OFFSETS[0])
        assert pager.next_begun() == ("write", STRIDE)
        assert torch.equal(region.read(BATCHES[0], CPU), torch.stack([HIDDEN_NTD[0], -HIDDEN_NTD[1]]))


def test_what_was_read_ahead_and_then_written_is_read_ahead_again(place: Disk) -> None:
    pager = HeldPager(place.pager)
    with closing(region_on(place, pager)) as region:
        region.write(slice(0, 8), HIDDEN_NTD)
        region.flush()
        pager.hold("read", OFFSETS[1])
        region.expect(BATCHES)
        assert {pager.next_begun() for _ in range(6)} >= {("read", OFFSETS[0]), ("read", OFFSETS[1])}
        region.write(slice(3, 4), -HIDDEN_NTD[3:4])
        assert pager.next_begun() == ("write", 3 * STRIDE)
        pager.let_go("read", OFFSETS[1])
        assert pager.next_begun() == ("read", OFFSETS[1])
        assert torch.equal(region.read(BATCHES[0], CPU), HIDDEN_NTD[:2])
        assert torch.equal(region.read(BATCHES[1], CPU), torch.cat([HIDDEN_NTD[2:3], -HIDDEN_NTD[3:4]]))


def test_a_batch_is_read_ahead_as_soon_as_it_is_written(place: Disk) -> None:
    pager = HeldPager(place.pager)
    with closing(region_on(place, pager)) as region:
        region.expect(BATCHES)
        region.write(BATCHES[1], HIDDEN_NTD[BATCHES[1]])
        assert pager.next_begun() == ("write", OFFSETS[1])
        region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
        begun = {pager.next_begun() for _ in range(3)}
        assert begun == {("write", OFFSETS[0]), ("read", OFFSETS[0]), ("read", OFFSETS[1])}
        assert torch.equal(region.read(slice(0, 4), CPU), HIDDEN_NTD[:4])


def test_a_read_out_of_order_leaves_the_order_as_it_was(place: Disk) -> None:
    with closing(filled(place)) as region:
        region.expect(BATCHES)
        assert torch.equal(region.read(slice(5, 8), CPU), HIDDEN_NTD[5:8])
        assert all(torch.equal(region.read(batch, CPU), HIDDEN_NTD[batch]) for batch in BATCHES)


def test_what_was_never_written_is_not_read(place: Disk) -> None:
    with closing(region_on(place)) as region:
        region.write(slice(0, 2), HIDDEN_NTD[:2])
        with pytest.raises(AssertionError, match="read, not all written"):
            region.read(slice(1, 3), CPU)


def test_a_byte_that_changed_on_disk_is_found_when_it_is_read(place: Disk) -> None:
    region = filled(place)
    (path,) = place.files()
    with path.open("r+b") as file:
        file.seek(5 * STRIDE + 77)
        byte = file.read(1)[0]
        file.seek(5 * STRIDE + 77)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    region.expect(BATCHES)
    assert torch.equal(region.read(slice(0, 4), CPU), HIDDEN_NTD[:4])
    with pytest.raises(
        StorageError, match=r"sequence 5 of the hidden states came back with crc32 .* run again"
    ) as info:
        region.read(BATCHES[2], CPU)
    assert str(path) in info.value.message
    region.close()
    assert nothing_held(place)


def test_a_file_cut_short_is_an_error_that_names_the_sequences(place: Disk) -> None:
    region = filled(place)
    (path,) = place.files()
    os.truncate(path, 4 * STRIDE)
    with pytest.raises(StorageError, match=r"hidden states are lost: .* run again"):
        region.read(BATCHES[3], CPU)
    region.close()
    assert nothing_held(place)


def test_a_failed_write_shows_in_whatever_is_asked_next_and_close_still_cleans(place: Disk) -> None:
    region = region_on(place, RefusingPager(place.pager))
    region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
    with pytest.raises(StorageError, match="no room at all"):
        region.flush()
    with pytest.raises(StorageError, match="no room at all"):
        region.write(BATCHES[1], HIDDEN_NTD[BATCHES[1]])
    with pytest.raises(StorageError, match="no room at all"):
        region.read(BATCHES[0], CPU)
    region.close()
    assert nothing_held(place)


def test_who_reads_what_is_being_written_gets_the_failure_of_that(place: Disk) -> None:
    pager, raised = RefusingPager(place.pager), list[Exception]()
    region = region_on(place, pager)
    pager.hold("write", OFFSETS[0])
    region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])

    def reader() -> None:
        try:
            region.read(BATCHES[0], CPU)
        except Exception as error:
            raised.append(error)

    thread = Thread(target=reader)
    thread.start()
    thread.join(0.05)
    pager.let_go("write", OFFSETS[0])
    thread.join(10)
    assert [(type(error), "no room at all" in str(error)) for error in raised] == [(StorageError, True)]
    region.close()


def test_a_failed_write_that_nobody_saw_shows_when_the_region_is_closed(place: Disk) -> None:
    pager = RefusingPager(place.pager)
    region = region_on(place, pager)
    region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
    with pytest.raises(StorageError, match="no room at all"):
        region.close()
    assert nothing_held(place)
    assert pager.num_buffers == 0
    region.close()


def test_a_file_that_vanished_is_an_error(place: Disk) -> None:
    region = filled(place)
    place.files()[0].unlink()
    with pytest.raises(StorageError, match="No such file or directory"):
        region.read(BATCHES[0], CPU)
    region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
    with pytest.raises(StorageError, match="No such file or directory"):
        region.flush()
    region.close()
    assert nothing_held(place)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with disk(tmp_path, "threads") as place:
        region = region_on(place)
        monkeypatch.setattr(os, "pwritev", refuse)
        region.write(BATCHES[0], HIDDEN_NTD[BATCHES[0]])
        with pytest.raises(StorageError, match="No space left on device"):
            region.flush()
        region.close()
        assert nothing_held(place)
