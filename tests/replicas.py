"""Replicas of one stage as threads of one process: `Peers` without a network, for tests."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch

from pipeline.errors import NumericsError

Result = TypeVar("Result")


class Meeting:
    """Where replicas exchange what each of them brings."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = Barrier(size, timeout=60)
        self._brought: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return what everybody has brought, by rank."""
        self._brought[rank] = value
        self.barrier.wait()
        everything = list(self._brought)
        self.barrier.wait()
        return everything


class ThreadPeer:
    """One replica; implements `pipeline.peers.Peers`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        everybodys = self._meeting.exchange(self.rank, [tensor.clone() for tensor in tensors])
        for place, tensor in enumerate(tensors):
            total = everybodys[0][place].clone()
            for others in everybodys[1:]:
                total += others[place]
            tensor.copy_(total)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        assert tensor.is_contiguous()
        tensor.copy_(self._meeting.exchange(self.rank, tensor.clone())[owner])

    def agree(self, numbers: torch.Tensor, what: str) -> None:
        if not all(torch.equal(numbers, others) for others in self._meeting.exchange(self.rank, numbers.clone())):
            raise NumericsError(f"replicas differ in {what}")


def together(size: int, work: Callable[[ThreadPeer], Result]) -> list[Result]:
    """Do something on every replica at once; return the results by rank, or raise what one has raised."""
    meeting = Meeting(size)

    def one(rank: int) -> Result:
        try:
            return work(ThreadPeer(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
