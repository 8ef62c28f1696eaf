"""Replicas in processes of their own: what they sum, hand around and agree on, and what happens when one dies."""

import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from multiprocessing.connection import Connection
from operator import add
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster import replicas
from cluster.replicas import Group, free_address
from pipeline.errors import ConfigError, NumericsError
from pipeline.peers import Peers
from tests.integration.processes import Child

CPU = torch.device("cpu")
LOCAL = "127.0.0.1"
SLABS = (replicas.SLAB_BYTES, 600, 104, 8)
"""Bytes a slab: more than all tensors, some of them, odd pieces of them, one number."""


@contextmanager
def replicas_doing(
    function: Callable[..., Any], *arguments: Any, size: int, timeout: float = 60
) -> Iterator[list[Child]]:
    """Processes that join one group, call `function(group, *arguments)` and report what it returned or raised."""
    address = free_address(LOCAL)
    with ExitStack() as stack:
        told = [(function, arguments, (address, rank, size, CPU, timeout)) for rank in range(size)]
        yield [stack.enter_context(Child(take_part, *one)) for one in told]


def take_part(reports: Connection, function: Callable[..., Any], arguments: Any, place: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        with Group.join(*place) as group:
            outcome = function(group, *arguments)
    except Exception as error:
        outcome = error
    reports.send(outcome)


def outcomes(function: Callable[..., Any], *arguments: Any, size: int) -> list[Any]:
    """What each replica reports, in rank order."""
    with replicas_doing(function, *arguments, size=size) as children:
        return [child.wait_for_report() for child in children]


@contextmanager
def alone() -> Iterator[Group]:
    """A group of one, in this process."""
    with Group.join(free_address(LOCAL), 0, 1, CPU, timeout=60) as group:
        yield group


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contribution(rank: int) -> list[torch.Tensor]:
    """What a replica brings: sizes of magnitude so different that the order of additions shows."""
    generator = torch.Generator().manual_seed(rank)

    def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        scale = 10.0 ** torch.randint(-2, 3, shape, generator=generator)
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)

    wide = made(torch.float32, 6, 13)
    return [
        made(torch.float64, 3, 5),
        made(torch.float32, 101),
        made(torch.bfloat16, 13, 7).T,
        made(torch.float32),
        made(torch.float32, 0, 3),
        wide.T.contiguous().T if rank == 1 else wide,
        made(torch.float64, 2, 3, 26)[:, :, ::2],
        made(torch.float32, 4, 4).requires_grad_(),
        made(torch.int64, 9),
        made(torch.bfloat16, 104),
    ]


def summed_with_slabs(group: Group, slabs: tuple[int, ...]) -> list[list[bytes]]:
    results = []
    for slab in slabs:
        replicas.SLAB_BYTES = slab
        tensors = contribution(group.rank)
        group.sum(tensors)
        results.append([raw(tensor) for tensor in tensors])
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_has_the_bits_of_additions_in_rank_order_whatever_the_slab(size: int) -> None:
    in_order = [raw(reduce(add, numbers)) for numbers in zip(*map(contribution, range(size)), strict=True)]
    for outcome in outcomes(summed_with_slabs, SLABS, size=size):
        assert outcome == [in_order] * len(SLABS)


def test_the_order_of_the_additions_shows_in_these_sums() -> None:
    forward, backward = (
        [reduce(add, n) for n in zip(*map(contribution, r), strict=True)] for r in ((0, 1, 2), (2, 1, 0))
    )
    differ = {f.dtype for f, b in zip(forward, backward, strict=True) if not torch.equal(f, b)}
    assert differ == {torch.float64, torch.float32, torch.bfloat16}


def sent_bytes(group: Group, slab: int, num_bytes: int) -> list[int]:
    """The size of every message to all replicas together, in a sum of so many bytes."""
    sent, exchange = [], dist.all_to_all_single

    def observed(incoming: torch.Tensor, outgoing: torch.Tensor, async_op: bool) -> Any:
        sent.append(outgoing.nbytes)
        return exchange(incoming, outgoing, async_op=async_op)

    replicas.SLAB_BYTES, dist.all_to_all_single = slab, observed
    group.sum([torch.zeros(num_bytes // 4)])
    return sent


def test_a_sum_goes_through_slabs_and_each_byte_goes_out_twice() -> None:
    assert outcomes(sent_bytes, 400, 1000, size=2) == [[400] * 4 + [200] * 2] * 2
    first, *_ = outcomes(sent_bytes, 400, 1000, size=3)
    assert first == [408] * 4 + [204] * 2, "pieces of whole numbers are all as long"


def handed_around(group: Group) -> list[list[bytes]]:
    results = []
    for owner in range(group.size):
        tensors = belongings(group.rank)
        for tensor in tensors:
            group.broadcast(tensor, owner)
        results.append([raw(tensor) for tensor in tensors])
    return results


def belongings(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    numbers = torch.randn(50, 3, generator=generator)
    kinds = [numbers > 0, numbers.bfloat16(), numbers.double(), numbers.requires_grad_(), numbers.long(), numbers.sum()]
    return [*kinds, torch.empty(0, 3)]


def test_a_broadcast_gives_everybody_what_its_owner_has() -> None:
    size = 3
    owned = [[raw(tensor) for tensor in belongings(owner)] for owner in range(size)]
    assert owned[0] != owned[1]
    assert outcomes(handed_around, size=size) == [owned] * size


AGREED = [[7, -(2**62)]] * 3
DISAGREEMENTS = {
    r"agree on the masks of block 3: of 3 replicas, replica 2 has .*, at 1: 5 instead of 2\)\. .* one type": (
        [1, 2, 3], [1, 2, 3], [1, 5, 4],
    ),
    r"replica 1, 2 has other numbers than replica 0 \(the first, at 0: 2 instead of 1\)": ([1], [2], [2]),
    r"agree on the count of the masks of block 3: .* 1 instead of 2": ([1, 2], [1], [1, 2]),
}  # fmt: skip


def agreements(group: Group, cases: list[Sequence[list[int]]]) -> list[NumericsError | None]:
    """What came of each attempt to agree; one that failed does not spoil the group."""
    results: list[NumericsError | None] = []
    for numbers in cases:
        try:
            group.agree(torch.tensor(numbers[group.rank], dtype=torch.int64), "the masks of block 3")
            results.append(None)
        except NumericsError as error:
            results.append(error)
    return results


def test_replicas_with_other_numbers_are_named_on_every_replica() -> None:
    for results in outcomes(agreements, [*DISAGREEMENTS.values(), AGREED], size=3):
        *errors, agreed = results
        assert agreed is None
        for message, error in zip(DISAGREEMENTS, errors, strict=True):
            with pytest.raises(NumericsError, match=message):
                raise error


def sum_without_the_last(group: Group, fatal: int) -> None:
    group.sum([torch.zeros(3)])
    if group.rank == group.size - 1:
        os.kill(os.getpid(), fatal)
    for _ in range(2):  # what the lost one had sent before may do for a first
        group.sum([torch.zeros(3)])


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_raise_when_a_replica_is_lost_or_stuck(fatal: int) -> None:
    with replicas_doing(sum_without_the_last, fatal, size=3, timeout=2) as children:
        for child in children[:-1]:
            with pytest.raises(RuntimeError, match=r"(?i)connection|timed out|time out"):
                raise child.wait_for_report()


def test_joining_without_the_others_raises() -> None:
    with pytest.raises(dist.DistError, match=r"(?i)timed out .* 1/2 clients joined"):
        Group.join(free_address(LOCAL), 0, 2, CPU, timeout=0.5)


def test_joining_where_somebody_else_listens_raises() -> None:
    with socket.create_server((LOCAL, 0)) as server, pytest.raises(dist.DistError, match="EADDRINUSE"):
        Group.join(f"{LOCAL}:{server.getsockname()[1]}", 0, 1, CPU, timeout=5)


def test_a_device_that_nothing_carries_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot sum over 'meta' devices, only over cpu and cuda: choose another"):
        Group.join(free_address(LOCAL), 0, 1, torch.device("meta"), timeout=5)


def test_what_a_group_cannot_take_is_refused() -> None:
    elsewhere = torch.zeros(2, device="meta")
    with alone() as group:
        for refused in (lambda: group.sum([elsewhere]), lambda: group.broadcast(elsewhere, 0)):
            with pytest.raises(AssertionError, match="a tensor on meta in a group over cpu"):
                refused()
        with pytest.raises(AssertionError, match="only a contiguous tensor is broadcast"):
            group.broadcast(torch.zeros(2, 3).T, 0)
        with pytest.raises(AssertionError, match=r"agree on it takes int64 numbers, not torch\.float32"):
            group.agree(torch.zeros(2), "it")


def test_a_group_serves_as_peers_and_can_be_joined_again() -> None:
    for _ in range(2):
        with alone() as group:
            peers: Peers = group
            numbers = torch.tensor([1.0, 2.0])
            peers.sum([numbers, torch.empty(0)])
            peers.sum([])
            assert numbers.tolist() == [1.0, 2.0]
            assert (peers.rank, peers.size) == (0, 1)


def test_gloo_listens_where_the_address_is_reached_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, initialise = [], dist.init_process_group

    def observed(*arguments: Any, **named: Any) -> None:
        seen.append(os.environ["GLOO_SOCKET_IFNAME"])
        initialise(*arguments, **named)

    monkeypatch.setattr(dist, "init_process_group", observed)
    with alone():
        assert seen == [next(name for _, name in socket.if_nameindex() if name.startswith("lo"))]
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_an_interface_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    with pytest.raises(RuntimeError, match="none-such"), alone():
        pass
    assert os.environ["GLOO_SOCKET_IFNAME"] == "none-such"


def has_address(host: str) -> bool:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


WITH_IPV6 = pytest.mark.skipif(not has_address("::1"), reason="no IPv6")


@pytest.mark.parametrize("host", [LOCAL, pytest.param("::1", marks=WITH_IPV6)])
def test_a_free_address_can_be_met_at(host: str) -> None:
    with Group.join(free_address(host), 0, 1, CPU, timeout=60) as group:
        group.agree(torch.zeros(1, dtype=torch.int64), "nothing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_an_accelerator_go_through_nccl() -> None:
    with Group.join(free_address(LOCAL), 0, 1, torch.device("cuda"), timeout=60) as group:
        assert dist.get_backend() == "nccl"
        for tensor in (given.to("cuda") for given in contribution(0)):
            before = raw(tensor.cpu())
            group.sum([tensor])
            group.broadcast(tensor := tensor.contiguous(), 0)
            assert raw(tensor.cpu()) == before
        group.agree(torch.arange(3, device="cuda"), "numbers")
