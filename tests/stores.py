"""Regions and boundaries of every kind for tests, and a pager whose transfers end when the test lets them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Literal

import pytest
import torch

from pipeline.activations import Boundary, Store
from pipeline.budget import Budget
from pipeline.errors import StorageError
from pipeline.paging.engines import open_pager, why_not_aio
from pipeline.paging.pager import Pager, Transfer
from pipeline.paging.spool import Spool

CPU = torch.device("cpu")
Engine = Literal["threads", "aio"]
ENGINES: tuple[Engine, ...] = ("threads", "aio")


@dataclass(frozen=True, slots=True)
class Disk:
    """A spool with an engine and an account of what is held."""

    directory: Path
    spool: Spool
    pager: Pager
    budget: Budget = field(default_factory=Budget)

    def store(self, batch: int) -> Store:
        return Store("disk", CPU, self.budget, self.spool, self.pager, batch=batch)

    def files(self) -> list[Path]:
        return [path for path in self.directory.rglob("*") if path.is_file() and path.stat().st_size > 0]


@contextmanager
def disk(directory: Path, engine: Engine) -> Iterator[Disk]:
    """A spool in an existing directory; skips the test where the engine cannot be used there."""
    if engine == "aio" and (reason := why_not_aio(directory)):
        pytest.skip(reason)
    with closing(open_pager(engine, directory)) as pager, Spool.opened(directory / "spool", None) as spool:
        yield Disk(directory / "spool", spool, pager)


def everything(boundary: Boundary) -> torch.Tensor:
    """A copy of all hidden states of a boundary, hidden_NTD."""
    return boundary.read(slice(0, boundary.num_sequences), CPU).clone()


@dataclass(slots=True)
class HeldTransfer:
    """A transfer that is not done before it is let go."""

    transfer: Transfer
    gone: Event

    def wait(self) -> None:
        assert self.gone.wait(10), "nobody let it go"
        self.transfer.wait()


class HeldPager:
    """A real pager whose transfers are done only once the test lets them go."""

    name = "held"

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._begun: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._gates: dict[tuple[str, int], Event] = {}
        self.num_buffers = 0

    def hold(self, what: str, offset: int) -> None:
        """Have the coming transfers at an offset wait."""
        self._gates[what, offset] = Event()

    def let_go(self, what: str, offset: int) -> None:
        """Let them be done, and those that come later."""
        self._gates[what, offset].set()

    def next_begun(self) -> tuple[str, int]:
        """The kind and offset of the next transfer that has begun; waits for it."""
        return self._begun.get(timeout=10)

    def none_begins(self) -> bool:
        """Whether no transfer begins for a moment."""
        try:
            self._begun.get(timeout=0.05)
        except Empty:
            return True
        return False

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self.num_buffers += 1
        return self._pager.buffer(num_bytes)

    def drop_buffer(self, buffer: torch.Tensor) -> None:
        self.num_buffers -= 1
        self._pager.drop_buffer(buffer)

    def read(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        return self._held("read", offset, self._pager.read(path, offset, buffer))

    def write(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        return self._held("write", offset, self._pager.write(path, offset, buffer))

    def close(self) -> None:
        self._pager.close()

    def _held(self, what: str, offset: int, transfer: Transfer) -> Transfer:
        self._begun.put((what, offset))
        gate = self._gates.get((what, offset))
        return transfer if gate is None else HeldTransfer(transfer, gate)


class RefusingPager(HeldPager):
    """A real pager on a disk that has no room for any write, once that is let go."""

    def write(self, path: Path, offset: int, buffer: torch.Tensor) -> Transfer:
        super().write(path, offset, buffer).wait()
        raise StorageError(f"{path}: no room at all")
