"""The two ends of a handoff as tests have them: an outlet that sends, an inlet that takes when it is let."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from cluster.handoff import Payload, Sender, Transport, decode, encode
from cluster.metrics import WorkerMetrics

NUM_SEQUENCES, NUM_TOKENS, NUM_FEATURES = 6, 8, 16
SHAPE = (NUM_SEQUENCES, NUM_TOKENS, NUM_FEATURES)


class Inlet:
    """The next stage as the handoff sees it: takes batches into its boundary, when it is let."""

    def __init__(self) -> None:
        self._may_take = threading.Event()

    def prepare(self, shape: tuple[int, int, int], dtype: torch.dtype, held: bool) -> None:
        self._hidden_NTD = torch.zeros(shape, dtype=dtype)
        self._taken: list[tuple[str, int, str]] = []
        self._mishap: Exception | None = None
        self._may_take.clear()
        if not held:
            self._may_take.set()

    @ray.method(concurrency_group="inlet")
    def receive(self, stream: str, start: int, payload: Payload | torch.Tensor) -> None:
        self._may_take.wait()
        if self._mishap is not None:
            raise self._mishap
        hidden_BTD = decode(payload)
        self._taken.append((stream, start, hidden_BTD.device.type))
        if stream == "dense":
            self._hidden_NTD[start : start + len(hidden_BTD)].copy_(hidden_BTD)

    def release(self, mishap: Exception | None = None) -> None:
        self._mishap = mishap
        self._may_take.set()

    @ray.method(concurrency_group="work")
    def work(self) -> None:
        """As a stage does while it prunes: for ever."""
        threading.Event().wait()

    def process(self) -> int:
        return os.getpid()

    def taken(self) -> list[tuple[str, int, str]]:
        return self._taken

    def bits(self) -> Payload:
        return encode(self._hidden_NTD)


class Outlet:
    """The stage before it, sending out of a method that runs all the while."""

    def forget(self, module: str) -> None:
        """Make a module impossible to import, as where it is not installed."""
        sys.modules[module] = None  # type: ignore[assignment]

    def run(
        self, receiver: ActorHandle[Any], transport: Transport, device: str, shape: tuple[int, ...] = SHAPE
    ) -> list[str]:
        said: list[str] = []
        sender = Sender(3, transport, WorkerMetrics(0, 0), said.append)
        sender.connect(receiver)
        send_all(sender, hidden(shape).to(device))
        return said


class Noted(WorkerMetrics):
    """Metrics that also remember the most batches there have been on their way."""

    most = 0
    now = 0

    def batches_in_flight(self, num_batches: int) -> None:
        super().batches_in_flight(num_batches)
        self.now = num_batches
        self.most = max(self.most, num_batches)


def hidden(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def an_inlet(num_gpus: float = 0) -> ActorHandle[Inlet]:
    groups = {"inlet": 1, "work": 1}
    made = ray.remote(num_cpus=0, num_gpus=num_gpus, concurrency_groups=groups, enable_tensor_transport=True)(Inlet)
    return made.remote()


def an_outlet(num_gpus: float = 0) -> ActorHandle[Outlet]:
    return ray.remote(num_cpus=0, num_gpus=num_gpus, enable_tensor_transport=True)(Outlet).remote()


def ready(
    receiver: ActorHandle[Inlet],
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float32,
    held: bool = False,
) -> ActorHandle[Inlet]:
    """A receiver with an empty boundary; when held it takes nothing before it is released."""
    ray.get(receiver.prepare.remote(shape, dtype, held))
    return receiver


def a_sender(window: int = 3) -> tuple[Sender, Noted]:
    """A sender in this very process, and its metrics; two batches may be on their way at once."""

    def fail(said: str) -> None:
        raise AssertionError(said)

    metrics = Noted(stage=0, replica=0)
    return Sender(window, "objects", metrics, fail), metrics


def send_all(sender: Sender, hidden_NTD: torch.Tensor) -> None:
    for start in range(len(hidden_NTD)):
        sender.send("dense", slice(start, start + 1), hidden_NTD[start : start + 1])
    sender.finish()


def until(happened: Callable[[], bool]) -> None:
    """Wait for what is bound to happen."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def begun(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def held_up(thread: threading.Thread) -> bool:
    """Whether a thread still waits when it has had plenty of time not to."""
    thread.join(timeout=0.3)
    return thread.is_alive()


def bits_of(receiver: ActorHandle[Inlet]) -> torch.Tensor:
    return decode(ray.get(receiver.bits.remote())).view(torch.uint8)


def places_taken(receiver: ActorHandle[Inlet]) -> list[int]:
    return [start for _, start, _ in ray.get(receiver.taken.remote())]
