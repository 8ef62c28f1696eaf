"""Joining a Ray cluster, or starting one here, and finding out what it offers a job."""

import math
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.depot import Depot
from cluster.handoff import EMPTY_AT_ONCE
from pipeline.cluster_config import ClusterConfig
from pipeline.devices import choose_device, total_bytes
from pipeline.errors import ConfigError

ANSWER_SECONDS = 10.0
"""How long a Ray head may take to accept a connection."""

LOOK_SECONDS = 120.0
"""How long a node may take to answer what it offers: a first Python process there may have to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a cluster offers a job."""

    num_slots: int
    """Workers that fit at the same time."""

    bundle: Mapping[str, float]
    """What each worker takes, in Ray's words."""

    device_type: str
    """What blocks run on."""

    device_bytes: int | None
    """Memory of the smallest device; on CPUs of the smallest node, shared by the workers there."""

    shares_files: bool
    """Whether every node sees the run directory."""


@contextmanager
def joined(settings: ClusterConfig, num_workers: int) -> Iterator[None]:
    """Be part of a cluster while the `with` block runs; one that was started for it ends with it.

    `num_workers` have room on a cluster that is started here, whatever the number of cores: stages mostly wait.
    """
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if settings.address == "local" or not _join(settings.address):
            cores = max(os.cpu_count() or 1, num_workers * settings.cpus)
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                _system_config=EMPTY_AT_ONCE,
            )
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)  # Ray has put one in its place that exits at once
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> bool:
    """Join a running cluster; False where `auto` finds none. Raises ConfigError where a named one is not there."""
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        ray.init(address=address)
    except (OSError, RuntimeError, ValueError) as error:
        if address == "auto" and isinstance(error, ConnectionError):
            return False
        raise ConfigError(
            f"cluster.address: no Ray cluster that this machine is part of answers at {address} "
            f"({str(error).splitlines()[0]}); it is the HOST:PORT of a head (`ray start --head`); this machine runs "
            "`ray start --address=HOST:PORT`; or use auto, or local for a cluster here alone"
        ) from None
    return True


def look_round(settings: ClusterConfig, asked_device: str, run_directory: Path) -> Offer:
    """Ask every node what it offers; raises ConfigError where none has room for a worker."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    has_gpus = any(node["Resources"].get("GPU", 0) > 0 for node in nodes)
    gpus = settings.gpus if settings.gpus != "auto" else float(has_gpus and asked_device != "cpu")
    if settings.replicas not in ("auto", 1) and 0 < gpus < 1:
        raise ConfigError(
            f"cluster.gpus: {gpus:g} of an accelerator for each of {settings.replicas} replicas; they sum over NCCL, "
            "which takes one process a device: ask for 1, or for one replica"
        )
    bundle: dict[str, float] = {"CPU": settings.cpus} | ({"GPU": gpus} if gpus else {})
    slots = {node["NodeID"]: _slots(node["Resources"], bundle) for node in nodes}
    if not any(slots.values()):
        listed = "; ".join(f"{n['NodeManagerAddress']}: {_listed(n['Resources'])}" for n in nodes)
        raise ConfigError(
            f"no node of the cluster has room for a worker of {_listed(bundle)} ({listed}); lower cluster.cpus or "
            "cluster.gpus, or add machines"
        )
    run_directory.mkdir(parents=True, exist_ok=True)
    sign = run_directory / f".shared.{token_hex(8)}.tmp"
    sign.touch()
    try:
        asked = [_look_from(node, settings, gpus, sign) for node, room in slots.items() if room]
        ready, late = ray.wait(asked, num_returns=len(asked), timeout=LOOK_SECONDS)
        for task in late:  # its accelerators are in use: the job waits for them, but need not know them
            ray.cancel(task, force=True)
        seen = _answers(ready)
    finally:
        sign.unlink()
    if not seen:
        raise ConfigError(
            f"none of {len(asked)} nodes with room for a worker of {_listed(bundle)} answered in {LOOK_SECONDS:g} s: "
            "their accelerators are in use, or they are out of reach; look at `ray status`, and run again"
        )
    return Offer(
        num_slots=sum(slots.values()),
        bundle=bundle,
        device_type=seen[0][0],
        device_bytes=min(size for _, size, _ in seen),
        shares_files=len(seen) == len(asked) and all(sees for _, _, sees in seen),
    )


def make_depot(directory: Path) -> ActorHandle[Any]:
    """Make the actor that takes shards in, on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class: Any = ray.remote(Depot)
    depot: ActorHandle[Any] = actor_class.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(
        directory
    )
    return depot


def _answers(ready: "list[ray.ObjectRef[tuple[str, int, bool]]]") -> list[tuple[str, int, bool]]:
    """Return what nodes have answered; one that was lost meanwhile has not."""
    seen = []
    for answer in ready:
        with suppress(ray.exceptions.RayError):
            seen.append(ray.get(answer))
    return seen


def _look_from(node: str, settings: ClusterConfig, gpus: float, sign: Path) -> "ray.ObjectRef[tuple[str, int, bool]]":
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    look: Any = ray.remote(_look)
    asked: ray.ObjectRef[tuple[str, int, bool]] = look.options(
        num_cpus=0, num_gpus=gpus, scheduling_strategy=there
    ).remote("auto" if gpus else "cpu", sign)
    return asked


def _look(device: str, sign: Path) -> tuple[str, int, bool]:
    """Return, from a node: the type of its device, the bytes it has, and whether a file of the coordinator is seen."""
    found = choose_device(device)
    with suppress(OSError):
        return found.type, total_bytes(found), sign.exists() and os.access(sign.parent, os.W_OK)
    return found.type, total_bytes(found), False


def _slots(offered: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    return min(math.floor(offered.get(name, 0) / amount) for name, amount in bundle.items())


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources) or "nothing"
