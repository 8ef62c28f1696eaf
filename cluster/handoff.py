"""Hidden states from one stage to the next, batch by batch, while both work.

    sender: one replica of a stage                receiver: the same replica of the next stage
    send(batch) ─ waits while too many batches
      │           are not taken yet
      └─ payload ──► receive(stream, start, payload): decode, copy into its own boundary, return
    one batch less on its way ◄── that it returns acknowledges the batch

A payload lies in Ray's object store (shared memory, on one node) until it is acknowledged. `window` is the number of
places for batches there: one is kept for a batch that is acknowledged but not gone yet, which takes Ray some
milliseconds, the others are for batches on their way. So the store holds at most `window` batches of each sender,
however many sequences there are.

The receiver is an actor whose method `receive` is in a concurrency group of its own, so that it takes batches while it
works; `start` is the place of the batch's first sequence. It may be given a batch twice, or one that it does not wait
for (nobody waits for the stream `probe`): it ignores those.
"""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import ActorDiedError, RayTaskError
from ray.experimental import wait_tensor_freed

from cluster.metrics import WorkerMetrics
from pipeline.errors import SecateurError

Transport = Literal["objects", "direct"]
"""`objects`: through host memory and Ray's object store; works everywhere. `direct`: out of the memory of one device
into that of the other, by Ray's direct transport over NIXL, where both actors have it."""

EMPTY_AT_ONCE = {"free_objects_batch_size": 1}
"""Ray's own setting (`_system_config`, or RAY_free_objects_batch_size=1 where each node of a cluster is started) for a
store that is emptied as batches are acknowledged. Without it Ray leaves what is freed there until there are 100 objects
of it, a second has passed, or the room is needed; nothing else changes."""

PROBE = "probe"
"""The stream of the one number that tries the direct transport."""

PROBE_SECONDS = 30.0
"""How long that number may take, each way. Two processes that have never met take some seconds to be introduced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One batch as it lies in the object store: as bytes, for numpy has no bfloat16."""

    dtype: torch.dtype
    bytes_BTX: npt.NDArray[np.uint8]
    """X: the bytes of one token's features."""


def encode(hidden_BTD: torch.Tensor) -> Payload:
    """Return hidden states, on any device, as a payload; shares memory with contiguous ones on the host."""
    hidden_BTD = hidden_BTD.detach().contiguous()
    if hidden_BTD.device.type != "cpu":
        staged_BTD = torch.empty(hidden_BTD.shape, dtype=hidden_BTD.dtype, pin_memory=True)
        hidden_BTD = staged_BTD.copy_(hidden_BTD)
    return Payload(dtype=hidden_BTD.dtype, bytes_BTX=hidden_BTD.view(torch.uint8).numpy())


def decode(payload: Payload | torch.Tensor) -> torch.Tensor:
    """Return the hidden_BTD that `receive` was given, without a copy: to be read, not written to, and not to be kept.

    Kept, it would hold on to its place in the object store. Sent directly, it is on this process's device.
    """
    if isinstance(payload, torch.Tensor):
        return payload
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(payload.bytes_BTX).view(payload.dtype)


def put_directly(hidden_BTD: torch.Tensor) -> ray.ObjectRef[torch.Tensor]:
    """Return a reference that Ray's direct transport turns into a tensor in the receiver's own memory.

    What is put stays on the device, and in use, until the reference is gone: so it is a copy.
    """
    return ray.put(hidden_BTD.detach().clone(memory_format=torch.contiguous_format), _tensor_transport="nixl")


def why_not_direct(receiver: ActorHandle[Any], device: torch.device) -> str | None:
    """Return what keeps the direct transport from reaching a receiver from a device; None where it does.

    One number makes the whole way, and back: that its memory is freed again shows that this actor was made with
    `enable_tensor_transport` and so frees while it works. A dead receiver speaks for nothing: whatever is sent to it
    is dropped.
    """
    number_1 = torch.zeros(1, device=device)
    try:
        taken: ray.ObjectRef[None] = receiver.receive.remote(PROBE, 0, ray.put(number_1, _tensor_transport="nixl"))
        ray.get(taken, timeout=PROBE_SECONDS)
        del taken
        wait_tensor_freed(number_1, PROBE_SECONDS)
    except ActorDiedError:
        return None
    except Exception as error:  # whatever it is, there is another way to send
        return f"{type(_cause(error)).__name__}: {_cause(error)}"
    return None


@dataclass(slots=True)
class _Link:
    """One receiver, from when it is connected until another one is."""

    receiver: ActorHandle[Any] | None
    """None: nobody wants the batches, or who wanted them is gone."""

    direct: bool | None = None
    """Whether the direct transport reaches it; None before it has been tried."""

    num_in_flight: int = 0
    error: SecateurError | None = None

    def has_room(self, most_in_flight: int) -> bool:
        """Whether another batch need not wait, if so many may be on their way."""
        return self.receiver is None or self.error is not None or self.num_in_flight < most_in_flight


class Sender:
    """The outlet of one replica of a stage. One thread sends; any thread connects."""

    def __init__(self, window: int, transport: Transport, metrics: WorkerMetrics, say: Callable[[str], None]) -> None:
        """Prepare to hand on batches with `window` places in the store; with 1, there may be two for a moment.

        `say` is told, once, that batches go through the object store although `direct` was asked for.
        """
        self._most_in_flight = max(1, window - 1)
        self._wants_direct = transport == "direct"
        self._told_why_not = False
        self._metrics = metrics
        self._say = say
        self._link: _Link | None = None
        # Guards the link and what is in it; notified of every change. Not held while a batch is given to Ray.
        self._changed = threading.Condition()

    def connect(self, receiver: ActorHandle[Any] | None) -> None:
        """Send to this actor from now on; None: nobody wants the batches, drop them until connected again.

        What is on its way to another actor is not sent again: a new receiver makes its own input.
        """
        with self._changed:
            self._link = _Link(receiver)
            self._metrics.batches_in_flight(0)
            self._changed.notify_all()

    def hold(self) -> None:
        """Have `send` wait from now on until connected: the receiver is on its way."""
        with self._changed:
            self._link = None
            self._metrics.batches_in_flight(0)

    def send(self, stream: str, sequences: slice, hidden_BTD: torch.Tensor) -> None:
        """Hand on a batch; first wait until connected, and until there is a place for it.

        Drops the batch when its receiver is gone. The tensor is free again once this returns. Raises the error that
        the receiver had with an earlier batch.
        """
        link, receiver = self._wait_for_room()
        if receiver is None:
            return
        direct = self._goes_directly(link, receiver, hidden_BTD.device)
        payload = put_directly(hidden_BTD) if direct else encode(hidden_BTD)
        # A receiver out of reach for a moment is tried again until it answers or is known to be dead.
        receive: ActorMethod = receiver.receive.options(max_task_retries=-1)
        taken: Future[None] = receive.remote(stream, sequences.start, payload).future()
        what = f"sequences {sequences.start}-{sequences.stop - 1} of the {stream} stream"
        taken.add_done_callback(partial(self._acknowledge, link, what))
        self._metrics.bytes_sent(hidden_BTD.nbytes)

    def finish(self) -> None:
        """Wait until every batch has been taken, or its receiver is gone; raises the error that a receiver had."""
        with self._changed:
            self._changed.wait_for(lambda: self._link is None or self._link.has_room(1))
            if self._link is not None and self._link.error is not None:
                raise self._link.error

    def _wait_for_room(self) -> tuple[_Link, ActorHandle[Any] | None]:
        """Return the link and who is at its end, having counted one batch more on its way there."""
        with self._changed:
            self._changed.wait_for(lambda: self._link is not None and self._link.has_room(self._most_in_flight))
            assert self._link is not None
            if self._link.error is not None:
                raise self._link.error
            if self._link.receiver is not None:
                self._count(self._link, 1)
            return self._link, self._link.receiver

    def _acknowledge(self, link: _Link, what: str, taken: "Future[None]") -> None:
        """Count one batch less on its way, and note how its receiver fared; Ray calls this, in a thread of its own."""
        error = taken.exception()
        with self._changed:
            self._count(link, -1)
            if isinstance(error, ActorDiedError):
                link.receiver = None
            elif error is not None and link.error is None:
                link.error = _refusal(what, error)
            self._changed.notify_all()

    def _count(self, link: _Link, change: int) -> None:
        link.num_in_flight += change
        if link is self._link:
            self._metrics.batches_in_flight(link.num_in_flight)

    def _goes_directly(self, link: _Link, receiver: ActorHandle[Any], device: torch.device) -> bool:
        """Whether to use the direct transport, found out at the first batch over a link."""
        if self._wants_direct and link.direct is None:
            why_not = why_not_direct(receiver, device)
            link.direct = why_not is None
            if why_not is not None and not self._told_why_not:
                self._told_why_not = True
                self._say(f"hidden states go through Ray's object store, not directly: {why_not}")
        return link.direct is True


def _cause(error: BaseException) -> BaseException:
    """Return what happened in the other process, out of what Ray wraps it in."""
    return error.cause if isinstance(error, RayTaskError) else error


def _refusal(what: str, error: BaseException) -> SecateurError:
    """Return a receiver's error as the sender's own, of the same kind where it is one of ours."""
    cause = _cause(error)
    if isinstance(cause, SecateurError):
        return type(cause)(f"the next stage could not take {what}: {cause.message}")
    return SecateurError(f"the next stage could not take {what}: {type(cause).__name__}: {cause}")
