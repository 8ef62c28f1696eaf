"""One job over many workers: what the cluster offers, a topology, the coordinator's run, and the end of the job."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cluster.actors import Place
from cluster.choice import Resources, choose
from cluster.coordinator import Coordinator
from cluster.expectation import shape_of
from cluster.forecast import Forecast, Links
from cluster.policy import Limits
from cluster.ray_cluster import Offer, joined, look_round, make_depot
from cluster.ray_runtime import RayRuntime
from cluster.topology import Topology, split_sequences
from cluster.trace import chrome_trace, overlaps
from cluster.worker import Brief
from pipeline.allocate import allocate
from pipeline.allocation import Allocation
from pipeline.cluster_config import ClusterConfig
from pipeline.config import RunConfig, resolved
from pipeline.job import Job, Scheme, Source, evaluate_job, finish, open_job, open_source, write_report
from pipeline.ledger import LEDGER_NAME, Ledger, RunLock, refuse_foreign
from pipeline.memory import fitted_memory
from pipeline.paging.spool import remove_leftovers, spool_directory
from pipeline.progress import Progress, StopAsked
from pipeline.report import Report
from pipeline.run import run

TRACE, CLUSTER = "trace.json", "cluster.json"

LINKS = Links(handoff_bytes_per_s=1.1e9, allreduce_bytes_per_s=1.1e9)
"""What is taken for granted of a network nobody has measured: 10 Gbit/s."""


def run_on_cluster(config: RunConfig, progress: Progress, stop_asked: StopAsked) -> Report:
    """Prune a model over the workers of a Ray cluster; for the rest as `pipeline.run.run`."""
    settings = config.cluster
    assert settings is not None
    refuse_foreign(config.output)
    num_workers = (settings.stages if settings.stages != "auto" else 1) * (
        settings.replicas if settings.replicas != "auto" else 1
    )
    with RunLock(config.output), joined(settings, num_workers):
        offer = look_round(settings, config.compute.device, config.output)
        if offer.device_type == "cpu" and config.compute.threads is None:
            # Rounding depends on it, so it becomes part of the run's identity.
            config = config.model_copy(update={"compute": config.compute.model_copy(update={"threads": settings.cpus})})
        with open_source(config, progress, stop_asked, run, offer.device_type) as source:
            if config.evaluate is not None and source.skeleton.device.type != offer.device_type:
                progress.say(f"perplexity is measured by this process, on {source.skeleton.device}, not by workers")
            topology, expected = _choose_topology(source, settings, offer, progress)
            spool = spool_directory(config.memory.spool, config.output)
            remove_leftovers(spool)  # but not before: trials of a shape that were cut short go on from theirs
            sequences = config.calibration.sequences
            with fitted_memory(config, source.skeleton, sequences, spool, surveys=True) as memory:
                job = open_job(source, memory, progress, stop_asked, scheme=scheme_of(topology))
                evaluate_job(job, "before")
                _prune(job, allocate(job), settings, offer, topology, expected)
                return finish(job)


def scheme_of(topology: Topology) -> Scheme:
    """Return what of a topology determines the bytes: where dense hand-overs are, and how many replicas sum."""
    scheme: dict[str, JsonValue] = {}
    if topology.handoff == "dense" and topology.num_stages > 1:
        scheme["dense_handoff_at"] = list(topology.bounds[1:-1])
    if topology.replicas > 1:
        scheme["replicas"] = topology.replicas
    return scheme


def _choose_topology(
    source: Source, settings: ClusterConfig, offer: Offer, progress: Progress
) -> tuple[Topology, Forecast]:
    """Return the topology asked for, or the best one, and say which and why; a resumed dense job keeps its own."""
    stages, begun_with = settings.stages, _stages_begun_with(source)
    if begun_with is not None and stages == "auto" and settings.handoff == "dense":
        stages = len(begun_with)
    shape = shape_of(source, settings)
    resources = Resources(num_slots=offer.num_slots, device_bytes=offer.device_bytes)
    topology, expected, lines = choose(stages, settings.replicas, settings.handoff, resources, shape, LINKS)
    for line in lines:
        progress.say(line)
    if begun_with is not None and settings.handoff == "dense" and len(begun_with) == topology.num_stages:
        topology = replace(topology, stages=begun_with)
    return topology, expected


def _stages_begun_with(source: Source) -> tuple[range, ...] | None:
    """Return the stages of a job with the dense handoff that has been begun before."""
    if not (source.config.output / LEDGER_NAME).is_file():
        return None
    cuts = Ledger.read(source.config.output).header.config.get("dense_handoff_at", [])
    if not isinstance(cuts, list):
        return None
    bounds = [0, *(int(str(cut)) for cut in cuts), source.skeleton.num_blocks]
    if any(start >= stop for start, stop in pairwise(bounds)):  # it was begun with another model: the ledger will say
        return None
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def _prune(
    job: Job, allocation: Allocation, settings: ClusterConfig, offer: Offer, topology: Topology, expected: Forecast
) -> None:
    """Run the coordinator to the end; what happened when is written whatever the end is."""
    shared = offer.shares_files if settings.shards == "auto" else settings.shards == "shared"
    if not shared:
        job.progress.say("nodes do not share the run directory: shards are sent to it")
    runtime = RayRuntime(
        briefs=briefs_of(job.source, allocation, topology),
        place=place_of(job, settings, offer, topology, shared),
        bundle=offer.bundle,
        depot=None if shared else make_depot(job.model_directory),
        say=job.progress.say,
    )
    coordinator = Coordinator(
        topology=topology,
        ledger=job.ledger,
        runtime=runtime,
        progress=job.progress,
        run_directory=job.config.output,
        limits=limits_of(settings, offer.bundle),
    )
    begun = time.monotonic()
    try:
        coordinator.run_to_end(job.stop_asked)
    finally:
        if coordinator.spans:
            write_report(job, TRACE, chrome_trace(coordinator.spans))
            facts = {
                "seconds": time.monotonic() - begun,
                "topology": {**asdict(topology), "stages": list(topology.bounds)},
                "expected_seconds": expected.seconds,
                "overlaps": asdict(overlaps(coordinator.spans)),
                "recoveries": [v for name, v in job.ledger.notes.items() if name.startswith("recovery.")],
            }
            write_report(job, CLUSTER, json.dumps(facts, indent=2).encode() + b"\n")


def briefs_of(source: Source, allocation: Allocation, topology: Topology) -> Callable[[int], list[Brief]]:
    """Return what makes the briefs of a stage's replicas."""
    tokens_NT = source.calibration.tokens_NT
    shares = split_sequences(len(tokens_NT), source.config.compute.batch, topology.replicas)
    settings: dict[str, Any] = resolved(source.config)
    # As the ledger has it: what a worker would choose for itself may differ.
    settings["compute"] |= {"device": source.device_type, "dtype": str(source.skeleton.dtype).removeprefix("torch.")}
    skeleton, tensors = source.skeleton, source.checkpoint.tensors
    block_bytes = tuple(
        sum(tensors[name].num_bytes for name in skeleton.block_names(index).values())
        for index in range(skeleton.num_blocks)
    )
    fingerprint = source.checkpoint.fingerprint()

    def briefs(stage: int) -> list[Brief]:
        return [
            Brief(
                settings=settings,
                allocation=allocation,
                handoff=topology.handoff,
                source=fingerprint,
                shape=None if source.chosen is None else source.chosen.shape,
                block_bytes=block_bytes,
                stage=stage,
                replica=replica,
                tokens_NT=tokens_NT[share.start : share.stop].clone(),
            )
            for replica, share in enumerate(shares)
        ]

    return briefs


def place_of(job: Job, settings: ClusterConfig, offer: Offer, topology: Topology, shared: bool) -> Place:
    """Return how workers are set up."""
    direct = settings.transport == "direct" or (settings.transport == "auto" and offer.device_type != "cpu")
    directory: Path | None = job.model_directory if shared else None
    return Place(
        model_directory=directory,
        scratch=settings.scratch,
        window=settings.window,
        transport="direct" if direct else "objects",
        threads=job.config.compute.threads or settings.cpus,
        num_replicas=topology.replicas,
    )


def limits_of(settings: ClusterConfig, bundle: Mapping[str, float]) -> Limits:
    """Return how often and how long the coordinator tries."""
    return Limits(
        max_restarts=settings.max_restarts,
        patience=settings.patience,
        give_up_after=settings.give_up_after,
        resources=", ".join(f"{amount:g} {name}" for name, amount in bundle.items()),
    )
