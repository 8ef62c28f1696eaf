"""The replicas of one stage, joined by torch.distributed: sums with the same bits on each of them and in every run.

An all-reduce leaves the order of the additions to the library. Here it is fixed. The tensors pass through a slab of
bounded size: replica r gets everybody's piece r of it, adds them up in rank order, and sends its sum to everybody.
Each replica sends 2 (size - 1) / size of the tensors' bytes, exactly what a ring's all-reduce sends. Both ways go
through `all_to_all_single`, as bytes: gloo's gathers take three times as long, and it does not know every dtype.

Legend: R replicas, N numbers of a piece.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, NumericsError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What carries the tensors of a type of device."""

SLAB_BYTES = 16 * 2**20
"""The most bytes that are summed at once; a replica holds two such slabs meanwhile."""

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class Group:
    """One replica among those of its stage, to be asked as `pipeline.peers.Peers`; a context manager.

    All replicas call the same methods in the same order, with tensors of the same shapes and dtypes, each on the device
    it has joined with. A process can be in one group at a time.

    Where another replica has died, is stuck, or has left, a method raises torch's RuntimeError (under nccl its subclass
    `torch.distributed.DistBackendError`) within the timeout; under nccl torch's watchdog may end the process first.
    The group is of no use then: leave it, and let the stage begin again.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        """Describe a group that has been joined; see `join`."""
        self.rank, self.size = rank, size
        self._device, self._timeout = device, timeout

    @classmethod
    def join(cls, address: str, rank: int, size: int, device: torch.device, timeout: float) -> "Group":
        """Meet the other replicas at `address` ("host:port", on the node of replica 0) and return once all are there.

        `timeout`, in seconds, holds for the meeting and for every method. Raises ConfigError for a device whose tensors
        nothing carries, and torch's `dist.DistError` (a RuntimeError) where replicas are missing after the timeout or
        the port has been taken by somebody else.
        """
        if device.type not in BACKENDS:
            raise ConfigError(
                f"replicas cannot sum over {device.type!r} devices, only over {' and '.join(BACKENDS)}: choose another "
                "compute.device, or one replica a stage"
            )
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        patience = timedelta(seconds=timeout)
        with _gloo_facing(address):
            dist.init_process_group(
                BACKENDS[device.type],
                init_method=f"tcp://{address}",
                rank=rank,
                world_size=size,
                timeout=patience,
                device_id=None if device.type == "cpu" else device,  # nccl connects now, not at the first sum
            )
        return cls(rank, size, device, patience)

    def leave(self) -> None:
        """Leave the group; the others must not need this replica any more."""
        dist.destroy_process_group()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:  # after an error the others may be in a sum, and leaving would wait for them: the process ends
            self.leave()

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all replicas: ((rank 0 + rank 1) + rank 2) + …

        Each addition rounds to the tensor's own dtype. Any strides will do, and need not be the same on all replicas.
        Takes memory for two slabs, however large the tensors are.
        """
        for tensor in tensors:
            self._check(tensor)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            self._sum_alike([tensor.detach() for tensor in tensors if tensor.dtype == dtype and tensor.numel()], dtype)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace a contiguous tensor of any dtype, in place, by the one that replica `owner` has."""
        self._check(tensor)
        assert tensor.is_contiguous(), "only a contiguous tensor is broadcast"
        if tensor.numel():
            self._wait(dist.broadcast(_as_bytes(tensor), src=owner, async_op=True))

    def agree(self, numbers: torch.Tensor, what: str) -> None:
        """Raise NumericsError on every replica, naming `what`, unless all of them hold the same int64 numbers.

        Takes memory for everybody's numbers, twice.
        """
        self._check(numbers)
        assert numbers.dtype == torch.int64, f"to agree on {what} takes int64 numbers, not {numbers.dtype}"
        numbers_N = numbers.reshape(-1)
        self._compare(torch.tensor([len(numbers_N)], device=self._device), f"the count of {what}")
        self._compare(numbers_N, what)

    def _sum_alike(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Sum tensors of one dtype, none of them empty, slab by slab."""
        num_slab = min(sum(tensor.numel() for tensor in tensors), max(1, SLAB_BYTES // dtype.itemsize))
        mine, theirs = torch.zeros(2, _round_up(num_slab, self.size), dtype=dtype, device=self._device)
        for parts in _slabs(tensors, num_slab):
            lengths = [part.numel() for part in parts]
            num_sent = _round_up(sum(lengths), self.size)  # the last few may be nobody's
            pieces = torch.split(mine[: sum(lengths)], lengths)
            for piece, part in zip(pieces, parts, strict=True):
                piece.view(part.shape).copy_(part)
            self._sum_slab(mine[:num_sent].view(self.size, -1), theirs[:num_sent].view(self.size, -1))
            for piece, part in zip(pieces, parts, strict=True):
                part.copy_(piece.view(part.shape))

    def _sum_slab(self, mine_RN: torch.Tensor, theirs_RN: torch.Tensor) -> None:
        """Replace `mine_RN`, in place, by its sum over all replicas; `theirs_RN` is room to work in."""
        self._exchange(mine_RN, theirs_RN)
        for rank in range(1, self.size):
            theirs_RN[0] += theirs_RN[rank]
        theirs_RN[1:] = theirs_RN[0]
        self._exchange(theirs_RN, mine_RN)

    def _compare(self, numbers_N: torch.Tensor, what: str) -> None:
        outgoing_RN = numbers_N.expand(self.size, -1).contiguous()
        numbers_RN = torch.empty_like(outgoing_RN)
        self._exchange(outgoing_RN, numbers_RN)
        differ_RN = (numbers_RN != numbers_RN[0]).cpu()
        ranks: list[int] = differ_RN.any(dim=1).nonzero().flatten().tolist()
        if not ranks:
            return
        place = int(differ_RN[ranks[0]].nonzero()[0])
        raise NumericsError(
            f"the replicas of a stage do not agree on {what}: of {self.size} replicas, replica "
            f"{', '.join(map(str, ranks))} has other numbers than replica 0 (the first, at {place}: "
            f"{int(numbers_RN[ranks[0], place])} instead of {int(numbers_RN[0, place])}). All must compute the same "
            "bits, and devices of different types do not: give each stage devices of one type, or one replica"
        )

    def _exchange(self, outgoing_RN: torch.Tensor, incoming_RN: torch.Tensor) -> None:
        """Send row r to replica r; row r of `incoming_RN` becomes what replica r has sent here."""
        if outgoing_RN.numel():
            self._wait(dist.all_to_all_single(_as_bytes(incoming_RN), _as_bytes(outgoing_RN), async_op=True))

    def _wait(self, work: dist.Work) -> None:
        """Wait with a timeout: without one, nccl's works would end the process instead of raising."""
        work.wait(self._timeout)

    def _check(self, tensor: torch.Tensor) -> None:
        assert tensor.device == self._device, f"a tensor on {tensor.device} in a group over {self._device}"


def free_address(host: str) -> str:
    """Return "host:port" with a port that is free just now on `host`, an address of this node; replica 0 announces it.

    Somebody else may take the port before replica 0 joins; joining then fails, and the stage begins again with another.
    """
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """See a contiguous tensor as flat uint8."""
    return tensor.detach().view(-1).view(torch.uint8)


def _slabs(tensors: Iterable[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Yield views, together the whole of all tensors, in lists that hold at most `most` numbers."""
    parts: list[torch.Tensor] = []
    room = most
    for part in (part for tensor in tensors for part in _parts(tensor, most)):
        if part.numel() > room:
            yield parts
            parts, room = [], most
        parts.append(part)
        room -= part.numel()
    if parts:
        yield parts


def _parts(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Yield views of at most `most` numbers, together the whole tensor; its shape alone says where it is cut."""
    if tensor.numel() <= most:
        yield tensor
        return
    dim = next(dim for dim, length in enumerate(tensor.shape) if length > 1)
    for part in torch.split(tensor, max(1, most * tensor.shape[dim] // tensor.numel()), dim):
        yield from _parts(part, most)


@contextmanager
def _gloo_facing(address: str) -> Iterator[None]:
    """Let gloo listen where `address` is reached from, unless the user has chosen an interface.

    By itself gloo takes the address that the node's own name resolves to, on many systems a loopback address.
    """
    interface = _interface_towards(address)
    if interface is None or GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[GLOO_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[GLOO_INTERFACE]


def _interface_towards(address: str) -> str | None:
    """Return the name of the network interface through which this node reaches "host:port"."""
    parsed = urlsplit(f"tcp://{address}")
    family, kind, _, _, target = socket.getaddrinfo(parsed.hostname, parsed.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # chooses a route, and sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in [entry.address for entry in found]), None)
