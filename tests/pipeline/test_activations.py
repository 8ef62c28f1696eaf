"""Boundaries: read and written batch by batch, and filled by another thread while they are read; on every tier."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Literal

import pytest
import torch

from pipeline.activations import ArrivingBoundary, Boundary, Store, batches, in_memory
from pipeline.budget import Budget
from pipeline.errors import NumericsError, StorageError
from tests.stores import CPU, RefusingPager, disk, everything

SHAPE = (5, 3, 2)
HIDDEN_NTD = torch.arange(30.0).view(SHAPE)


@pytest.fixture(params=["memory", "threads", "aio"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    kind: Literal["memory", "threads", "aio"] = request.param
    if kind == "memory":
        yield in_memory()
        return
    with disk(tmp_path, kind) as place:
        yield place.store(batch=2)


def filled(store: Store, name: str = "pruned") -> Boundary:
    boundary = store.boundary(name, SHAPE, torch.float32)
    boundary.write(slice(0, 5), HIDDEN_NTD, "the test")
    return boundary


def arriving(store: Store) -> ArrivingBoundary:
    return store.arriving("pruned", SHAPE, torch.float32)


def test_sequences_are_split_into_batches_of_at_most_the_size() -> None:
    assert list(batches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_boundary_says_what_it_holds(store: Store) -> None:
    boundary = filled(store)
    assert (boundary.shape, boundary.dtype, boundary.num_sequences) == (SHAPE, torch.float32, 5)
    assert boundary.has_begun
    boundary.close()


def test_each_batch_may_be_replaced_once_it_is_read(store: Store) -> None:
    boundary = filled(store)
    for _ in range(3):
        seen = []
        for sequences, hidden_BTD in boundary.stream(2, CPU):
            boundary.write(sequences, hidden_BTD + 1, "a block")
            seen.append(sequences)
        assert seen == list(boundary.batches(2))
    assert torch.equal(everything(boundary), HIDDEN_NTD + 3)
    boundary.close()


def test_a_stream_may_end_after_some_sequences(store: Store) -> None:
    boundary = filled(store)
    assert [sequences for sequences, _ in boundary.stream(2, CPU, num_sequences=3)] == [slice(0, 2), slice(2, 3)]
    assert all(torch.equal(hidden_BTD, HIDDEN_NTD[part]) for part, hidden_BTD in boundary.stream(2, CPU))
    boundary.close()


def test_a_copy_is_independent(store: Store) -> None:
    original = filled(store)
    copy = store.copy("dense", original)
    assert torch.equal(everything(copy), HIDDEN_NTD)
    copy.write(slice(0, 5), torch.zeros(SHAPE), "the test")
    assert torch.equal(everything(original), HIDDEN_NTD)
    original.close()
    copy.close()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with disk(tmp_path, "threads") as place:
        original = filled(place.store(batch=2))
        assert torch.equal(everything(original), HIDDEN_NTD)
        held, (path,) = place.budget.held("host"), place.files()
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(StorageError, match="came back with crc32"):
            place.store(batch=2).copy("dense", original)
        assert (place.budget.held("host"), place.files()) == (held, [path])
        original.close()


def test_what_is_not_finite_is_not_written(store: Store) -> None:
    boundary = filled(store)
    with pytest.raises(NumericsError, match="hidden states after block 3 hold NaN or Inf"):
        boundary.write(slice(0, 1), torch.full((1, 3, 2), torch.inf), "block 3")
    assert torch.equal(everything(boundary), HIDDEN_NTD)
    boundary.close()


def test_a_tier_is_taken_from_its_own_part_of_the_budget() -> None:
    budget = Budget()
    tiers: list[Literal["device", "pinned", "host"]] = ["device", "pinned", "host"]
    boundaries = [Store(tier, CPU, budget).boundary("pruned", SHAPE, torch.float32) for tier in tiers]
    assert (budget.held("device"), budget.held("host")) == (120, 240)
    for boundary in boundaries:
        boundary.close()
    assert budget.held("device") == budget.held("host") == 0


def test_a_reader_waits_for_the_sequences_it_wants_and_no_others(store: Store) -> None:
    boundary, done, read = arriving(store), Event(), []

    def reader() -> None:
        read.append(boundary.read(slice(2, 4), CPU).clone())
        done.set()

    thread = Thread(target=reader)
    thread.start()
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    assert boundary.has_begun
    assert not done.wait(0.05)
    boundary.put(slice(2, 4), HIDDEN_NTD[2:4])
    thread.join(10)
    assert torch.equal(read[0], HIDDEN_NTD[2:4])
    assert not boundary.complete
    boundary.put(slice(4, 5), HIDDEN_NTD[4:5])
    boundary.wait()
    assert boundary.complete
    assert torch.equal(everything(store.copy("dense", boundary)), HIDDEN_NTD)


def test_a_batch_that_comes_again_does_not_replace_what_was_made_of_it(store: Store) -> None:
    boundary = arriving(store)
    assert not boundary.has_begun
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    boundary.write(slice(0, 2), -HIDDEN_NTD[0:2], "a block")
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    assert torch.equal(boundary.read(slice(0, 2), CPU), -HIDDEN_NTD[0:2])


@pytest.mark.parametrize("seed", range(5))
def test_batches_arrive_in_any_order_while_those_before_are_replaced(store: Store, seed: int) -> None:
    boundary = store.arriving("pruned", (40, 3, 2), torch.float32)
    hidden_NTD = torch.arange(240.0).view(40, 3, 2)
    order = Random(seed).sample(list(batches(40, 3)), 14)
    thread = Thread(target=lambda: [boundary.put(part, hidden_NTD[part]) for part in order])
    thread.start()
    for part, hidden_BTD in boundary.stream(4, CPU):
        boundary.write(part, -hidden_BTD, "a block")
    thread.join(10)
    assert torch.equal(everything(boundary), -hidden_NTD)
    boundary.close()


def test_who_waits_for_what_could_not_be_stored_is_told(tmp_path: Path) -> None:
    with disk(tmp_path, "threads") as place:
        store = Store("disk", CPU, place.budget, place.spool, RefusingPager(place.pager))
        boundary, raised = arriving(store), list[StorageError]()

        def reader() -> None:
            try:
                boundary.read(slice(4, 5), CPU)
            except StorageError as error:
                raised.append(error)

        thread = Thread(target=reader)
        thread.start()
        with pytest.raises(StorageError, match="no room at all"):
            boundary.put(slice(0, 4), HIDDEN_NTD[0:4])  # one after the other in two slots: the third waits
        thread.join(10)
        assert len(raised) == 1
        with pytest.raises(StorageError, match="no room at all"):
            boundary.wait()
        boundary.close()
        assert place.files() == []


def test_what_arrives_after_the_end_is_ignored_so_that_its_sender_does_not_fail_too(store: Store) -> None:
    boundary = arriving(store)
    boundary.put(slice(0, 2), HIDDEN_NTD[:2])
    boundary.close()
    boundary.put(slice(2, 4), HIDDEN_NTD[2:4])
    assert not boundary.complete
