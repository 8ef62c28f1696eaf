"""Regions of every kind: each is a plain tensor to who reads and writes it, and gives back what it took."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.budget import Budget
from pipeline.errors import BudgetExceeded
from pipeline.paging.disk_region import DiskRegion
from pipeline.paging.region import MemoryRegion, Region
from tests.stores import CPU, Disk, Engine, disk

SHAPE = (7, 3, 5)
HIDDEN_NTD = torch.randn(SHAPE, generator=torch.manual_seed(0)).bfloat16()
SIZE = HIDDEN_NTD.nbytes

Kind = Literal["device", "host", "threads", "aio"]
needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing done to a region; a write puts `scale` times the original values."""

    name: Literal["expect", "read", "write"]
    slices: list[slice]
    scale: int = 1


def slices() -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, 6), st.integers(1, 4)).map(lambda at: slice(at[0], min(at[0] + at[1], 7)))


OPERATIONS = st.lists(
    st.one_of(
        st.builds(Operation, st.just("expect"), st.lists(slices(), max_size=6)),
        st.builds(Operation, st.just("read"), st.lists(slices(), min_size=1, max_size=1)),
        st.builds(Operation, st.just("write"), st.lists(slices(), min_size=1, max_size=1), st.integers(-9, 9)),
    ),
    max_size=40,
)


@pytest.fixture(params=["device", "host", "threads", "aio"], scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def place(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk | None]:
    with ExitStack() as held:
        engine: Engine | None = None if kind in ("device", "host") else kind
        yield held.enter_context(disk(tmp_path_factory.mktemp("regions"), engine)) if engine else None


def region_of(kind: Kind, place: Disk | None, budget: Budget, slot_sequences: int = 2, depth: int = 2) -> Region:
    if kind in ("device", "host"):
        return MemoryRegion("pruned", SHAPE, torch.bfloat16, tier=kind, device=CPU, budget=budget)
    assert place is not None
    return DiskRegion(
        "pruned", SHAPE, torch.bfloat16,
        spool=place.spool, pager=place.pager, budget=budget, slot_sequences=slot_sequences, depth=depth,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS, slot_sequences=st.integers(1, 9), depth=st.integers(1, 3))
def test_a_region_is_a_tensor_to_who_reads_and_writes_it(
    kind: Kind, place: Disk | None, operations: list[Operation], slot_sequences: int, depth: int
) -> None:
    expected_NTD, written = torch.empty_like(HIDDEN_NTD), set[int]()
    with closing(region_of(kind, place, Budget(), slot_sequences, depth)) as region:
        for operation in operations:
            for sequences in operation.slices:
                numbers = set(range(SHAPE[0])[sequences])
                if operation.name == "write":
                    hidden_BTD = HIDDEN_NTD[sequences] * operation.scale
                    expected_NTD[sequences] = hidden_BTD
                    region.write(sequences, hidden_BTD)
                    hidden_BTD.fill_(torch.nan)  # a region copies
                    written |= numbers
                elif operation.name == "read" and numbers <= written:
                    assert torch.equal(region.read(sequences, CPU), expected_NTD[sequences])
            if operation.name == "expect":
                region.expect(operation.slices)


def test_the_bytes_moved_are_counted_without_padding(kind: Kind, place: Disk | None) -> None:
    with closing(region_of(kind, place, Budget())) as region:
        region.write(slice(0, 7), HIDDEN_NTD)
        batches = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
        for _ in range(3):
            region.expect(batches)
            for sequences in batches:
                region.write(sequences, region.read(sequences, CPU))
        assert (region.bytes_read, region.bytes_written) == (3 * SIZE, 4 * SIZE)


def test_what_a_region_takes_it_gives_back_once(kind: Kind, place: Disk | None) -> None:
    budget = Budget()
    region = region_of(kind, place, budget)
    taken = {"device": (SIZE, 0, 0), "host": (0, SIZE, 0)}.get(kind, (0, 2 * 2 * 2 * 4096, 7 * 4096))
    assert (budget.held("device"), budget.held("host"), budget.held("spool")) == taken
    region.close()
    region.close()
    assert budget.held("device") == budget.held("host") == budget.held("spool") == 0


def test_a_region_that_passes_a_ceiling_is_refused_and_leaves_nothing(kind: Kind, place: Disk | None) -> None:
    budget = Budget({"device": SIZE - 1, "host": SIZE - 1})
    with pytest.raises(BudgetExceeded, match="pruned boundary needs"):
        region_of(kind, place, budget)
    assert budget.held("device") == budget.held("host") == budget.held("spool") == 0
    assert place is None or place.files() == []


def test_pinned_memory_is_plain_memory_where_there_is_no_accelerator() -> None:
    budget = Budget()
    with closing(MemoryRegion("pruned", SHAPE, torch.bfloat16, tier="pinned", device=CPU, budget=budget)) as region:
        region.write(slice(0, 7), HIDDEN_NTD)
        assert budget.held("host") == SIZE
        assert torch.equal(region.read(slice(2, 5), CPU), HIDDEN_NTD[2:5])


@needs_accelerator
@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "pinned", "host", "disk"])
def test_hidden_states_of_the_accelerator_pass_through_every_tier(
    tier: Literal["device", "pinned", "host", "disk"], tmp_path: Path
) -> None:
    device = torch.device("cuda")
    shape = (9, 64, 1024)
    hidden_NTD = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    parts = [slice(at, at + 2) for at in range(0, 8, 2)] + [slice(8, 9)]
    with ExitStack() as held:
        region: Region
        if tier == "disk":
            at = held.enter_context(disk(tmp_path, "threads"))
            region = DiskRegion(
                "pruned", shape, torch.float32,
                spool=at.spool, pager=at.pager, budget=at.budget, slot_sequences=2,
            )  # fmt: skip
        else:
            region = MemoryRegion("pruned", shape, torch.float32, tier=tier, device=device, budget=Budget())
        held.enter_context(closing(region))
        region.write(slice(0, 9), hidden_NTD)
        for scale in (2, 4):
            region.expect(parts)
            for part in parts:
                region.write(part, 2 * region.read(part, device))
            assert torch.equal(region.read(slice(0, 9), CPU), scale * hidden_NTD.cpu())


@needs_accelerator
@pytest.mark.gpu
def test_pinned_memory_is_pinned() -> None:
    device = torch.device("cuda")
    with closing(MemoryRegion("pruned", SHAPE, torch.float32, tier="pinned", device=device, budget=Budget())) as region:
        region.write(slice(0, 7), HIDDEN_NTD.float())
        assert region.read(slice(0, 7), CPU).is_pinned()
