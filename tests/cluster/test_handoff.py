"""The handoff between real Ray actors: every bit arrives, the window holds, and nobody waits for the dead."""

import os
import signal
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import ray
import torch
from ray.actor import ActorHandle

from pipeline.errors import NumericsError, SecateurError
from tests.cluster.handoff_ends import (
    NUM_FEATURES,
    NUM_SEQUENCES,
    NUM_TOKENS,
    SHAPE,
    Inlet,
    Outlet,
    a_sender,
    an_inlet,
    an_outlet,
    begun,
    bits_of,
    held_up,
    hidden,
    places_taken,
    ready,
    send_all,
    until,
)
from tests.cluster.object_store import watched_stores
from tests.cluster.ray_session import ray_cluster as ray_cluster

needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="the direct transport needs nixl: pip install nixl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The actors of all tests of this file, but those that only some machines can have."""

    first: ActorHandle[Inlet]
    second: ActorHandle[Inlet]
    doomed: ActorHandle[Inlet]
    """One test kills it."""

    outlet: ActorHandle[Outlet]


@pytest.fixture(scope="module")
def cast(ray_cluster: None) -> Cast:
    return Cast(first=an_inlet(), second=an_inlet(), doomed=an_inlet(), outlet=an_outlet())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_of_every_dtype_arrives(cast: Cast, dtype: torch.dtype) -> None:
    hidden_NTD = hidden(SHAPE, dtype)
    hidden_NTD[0, 0, :2] = torch.tensor([float("nan"), -0.0])
    receiver, (sender, _) = ready(cast.first, dtype=dtype), a_sender()
    sender.connect(receiver)
    send_all(sender, hidden_NTD)
    assert torch.equal(bits_of(receiver), hidden_NTD.view(torch.uint8))


def test_batches_find_their_places_in_any_order_and_layout(cast: Cast) -> None:
    hidden_NDT = hidden((NUM_SEQUENCES, NUM_FEATURES, NUM_TOKENS))
    receiver, (sender, _) = ready(cast.first), a_sender()
    sender.connect(receiver)
    for sequences in (slice(4, 6), slice(0, 1), slice(1, 4), slice(0, 1)):
        sender.send("dense", sequences, hidden_NDT[sequences].mT)
    sender.finish()
    assert places_taken(receiver) == [4, 0, 1, 0]
    assert torch.equal(bits_of(receiver), hidden_NDT.mT.contiguous().view(torch.uint8))


def test_a_batch_may_be_written_to_once_it_is_sent(cast: Cast) -> None:
    receiver, (sender, _) = ready(cast.first, held=True), a_sender()
    sender.connect(receiver)
    batch_BTD = hidden((1, NUM_TOKENS, NUM_FEATURES))
    sent_BTD = batch_BTD.clone()
    sender.send("dense", slice(0, 1), batch_BTD)
    batch_BTD.zero_()
    ray.get(receiver.release.remote())
    sender.finish()
    assert torch.equal(bits_of(receiver)[:1], sent_BTD.view(torch.uint8))


def test_a_sender_waits_while_the_window_is_full(cast: Cast) -> None:
    receiver, (sender, metrics) = ready(cast.first, held=True), a_sender(window=3)
    sender.connect(receiver)
    sending = begun(lambda: send_all(sender, hidden(SHAPE)))
    until(lambda: metrics.now == 2)
    assert held_up(sending)
    ray.get(receiver.release.remote())
    sending.join()
    assert places_taken(receiver) == list(range(NUM_SEQUENCES))
    assert (metrics.most, metrics.now) == (2, 0)


@pytest.mark.parametrize("num_sequences", [6, 24])
def test_the_store_holds_no_more_than_the_window_however_many_sequences_there_are(
    cast: Cast, num_sequences: int
) -> None:
    batch_bytes = 4 * 2**20
    hidden_NTD = torch.zeros(num_sequences, 1024, 1024)
    receiver, (sender, _) = ready(cast.first, hidden_NTD.shape), a_sender(window=2)
    with watched_stores() as stores:
        before = stores.created_bytes()
        sender.connect(receiver)
        send_all(sender, hidden_NTD)
        assert stores.created_bytes() - before >= num_sequences * batch_bytes
    (peak_bytes,) = stores.peak_bytes.values()
    assert peak_bytes <= 1.1 * 2 * batch_bytes


def test_a_batch_that_is_taken_leaves_the_store(cast: Cast) -> None:
    receiver, (sender, _) = ready(cast.first, (6, 512, 512), held=True), a_sender(window=3)
    sender.connect(receiver)
    sending = begun(lambda: send_all(sender, torch.zeros(6, 512, 512)))
    with watched_stores() as stores:
        until(lambda: stores.used_bytes() >= 2 * 2**20)
        assert held_up(sending)
        assert stores.used_bytes() <= 1.1 * 2 * 2**20
        ray.get(receiver.release.remote())
        sending.join()
        until(lambda: stores.used_bytes() == 0)


def test_nothing_is_sent_before_there_is_somebody_to_send_to(cast: Cast) -> None:
    receiver, (sender, metrics) = ready(cast.first), a_sender()
    sending = begun(lambda: send_all(sender, hidden(SHAPE)))
    assert held_up(sending)
    assert metrics.most == 0
    sender.connect(receiver)
    sending.join()
    assert places_taken(receiver) == list(range(NUM_SEQUENCES))


def test_what_nobody_wants_is_dropped(ray_cluster: None) -> None:
    sender, metrics = a_sender()
    sending = begun(lambda: send_all(sender, hidden(SHAPE)))
    assert held_up(sending)
    sender.connect(None)
    sending.join()
    assert metrics.most == 0


def test_a_sender_stops_waiting_when_its_batches_are_no_longer_wanted(cast: Cast) -> None:
    receiver, (sender, metrics) = ready(cast.first, held=True), a_sender()
    sender.connect(receiver)
    sending = begun(lambda: send_all(sender, hidden(SHAPE)))
    until(lambda: metrics.now == 2)
    assert held_up(sending)
    sender.connect(None)
    sending.join()
    assert metrics.now == 0
    ray.get(receiver.release.remote())
    until(lambda: places_taken(receiver) == [0, 1])


def test_a_new_receiver_gets_what_is_sent_from_then_on(cast: Cast) -> None:
    old, receiver, (sender, metrics) = ready(cast.first, held=True), ready(cast.second), a_sender()
    sender.connect(old)
    sending = begun(lambda: send_all(sender, hidden(SHAPE)))
    until(lambda: metrics.now == 2)
    assert held_up(sending)
    sender.connect(receiver)
    sending.join()
    assert places_taken(receiver) == [2, 3, 4, 5]
    ray.get(old.release.remote())
    until(lambda: places_taken(old) == [0, 1])
    assert metrics.now == 0


def test_a_dead_receiver_disturbs_nobody(cast: Cast) -> None:
    receiver, (sender, metrics) = ready(cast.doomed, (6, 512, 512), held=True), a_sender()
    process = ray.get(receiver.process.remote())
    sender.connect(receiver)
    sending = begun(lambda: send_all(sender, torch.zeros(6, 512, 512)))
    with watched_stores() as stores:
        until(lambda: stores.used_bytes() >= 2 * 2**20)
        os.kill(process, signal.SIGKILL)
        sending.join()  # the rest is dropped
        until(lambda: stores.used_bytes() == 0)
    assert metrics.now == 0
    sender.connect(ready(cast.first))
    send_all(sender, hidden(SHAPE))
    assert places_taken(cast.first) == list(range(NUM_SEQUENCES))


@pytest.mark.parametrize(
    ("mishap", "kind", "message"),
    [
        (NumericsError("hidden states hold NaN"), NumericsError, r"^the next stage .* hidden states hold NaN$"),
        (
            ValueError("odd"),
            SecateurError,
            r"^the next stage could not take sequences 0-0 of the dense .* ValueError: odd$",
        ),
    ],
)
def test_the_receivers_error_is_the_senders_own(
    cast: Cast, mishap: Exception, kind: type[SecateurError], message: str
) -> None:
    receiver, (sender, _) = ready(cast.first, held=True), a_sender()
    sender.connect(receiver)
    sender.send("dense", slice(0, 1), hidden((1, NUM_TOKENS, NUM_FEATURES)))
    ray.get(receiver.release.remote(mishap))
    with pytest.raises(kind, match=message) as finished:
        sender.finish()
    with pytest.raises(kind, match=message):
        sender.send("dense", slice(1, 2), hidden((1, NUM_TOKENS, NUM_FEATURES)))
    assert type(finished.value) is kind
    sender.connect(ready(cast.first))
    send_all(sender, hidden(SHAPE))


def test_stages_at_work_hand_on_and_take(cast: Cast) -> None:
    receiver = ready(cast.second)
    receiver.work.remote()
    assert ray.get(cast.outlet.run.remote(receiver, "objects", "cpu")) == []
    assert torch.equal(bits_of(receiver), hidden(SHAPE).view(torch.uint8))


def test_without_a_direct_transport_batches_go_through_the_store_and_that_is_said_once(cast: Cast) -> None:
    receiver = ready(cast.first)
    ray.get(cast.outlet.forget.remote("nixl"))
    (said,) = ray.get(cast.outlet.run.remote(receiver, "direct", "cpu"))
    assert said.startswith("hidden states go through Ray's object store, not directly: ModuleNotFoundError")
    assert torch.equal(bits_of(receiver), hidden(SHAPE).view(torch.uint8))


@needs_nixl
def test_batches_go_directly_where_both_actors_can(cast: Cast) -> None:
    sending, receiver = an_outlet(), ready(cast.first, (6, 512, 512))
    with watched_stores() as stores:
        before = stores.created_bytes()
        assert ray.get(sending.run.remote(receiver, "direct", "cpu", (6, 512, 512))) == []
        assert stores.created_bytes() - before < 2**20
    assert ray.get(receiver.taken.remote())[0] == ("probe", 0, "cpu")
    assert torch.equal(bits_of(receiver), hidden((6, 512, 512)).view(torch.uint8))


@needs_nixl
def test_a_dead_receiver_is_no_reason_against_the_direct_transport(ray_cluster: None) -> None:
    receiver = an_inlet()
    ray.kill(receiver)
    assert ray.get(an_outlet().run.remote(receiver, "direct", "cpu")) == []


@pytest.mark.gpu
@needs_accelerator
@needs_nixl
def test_batches_go_from_device_to_device(ray_cluster: None) -> None:
    sending, receiver = an_outlet(num_gpus=0.5), ready(an_inlet(num_gpus=0.5))
    assert ray.get(sending.run.remote(receiver, "direct", "cuda")) == []
    assert {device for _, _, device in ray.get(receiver.taken.remote())} == {"cuda"}
    assert torch.equal(bits_of(receiver), hidden(SHAPE).view(torch.uint8))


@pytest.mark.gpu
@needs_accelerator
def test_batches_on_a_device_go_through_the_store(cast: Cast) -> None:
    hidden_NTD = hidden(SHAPE, torch.bfloat16)
    receiver, (sender, _) = ready(cast.first, dtype=torch.bfloat16), a_sender()
    sender.connect(receiver)
    send_all(sender, hidden_NTD.to("cuda"))
    assert torch.equal(bits_of(receiver), hidden_NTD.view(torch.uint8))
