"""How many stages and replicas a job gets: as asked, or by forecast; and what to tell the user about it.

`auto` stages: the fewest that are within 2% of the fastest. With handoff `pruned` a stage waits for the one before
it, and only collecting overlaps with propagating: the choice is between one stage and as many as there is room for.
With handoff `dense` all stages prune at once, and time falls almost as their number grows.

`auto` replicas: always 1. Replicas are faster, but they change what comes out: Gram matrices are rounded otherwise, and
BESA makes fewer updates of more sequences each. That is not for a machine to decide by how many others are idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.forecast import Forecast, Links, forecast
from cluster.job_shape import JobShape
from cluster.topology import Topology, partition, split_sequences
from pipeline.cluster_config import Handoff
from pipeline.errors import ConfigError

Asked = int | Literal["auto"]

WORTH_MORE_STAGES = 1.02
"""How much longer a job may take with fewer stages before more are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a cluster offers."""

    num_slots: int
    """Workers (one accelerator each, or the CPUs asked for) that have room at the same time."""

    device_bytes: int | None = None
    """Memory where the blocks of one worker run, or None where nobody knows."""


def choose(
    asked_stages: Asked,
    asked_replicas: Asked,
    handoff: Handoff,
    resources: Resources,
    job: JobShape,
    links: Links,
) -> tuple[Topology, Forecast, list[str]]:
    """Return a topology, its forecast, and the lines that explain both.

    More stages than there is room for take turns. Raises ConfigError where there are more stages than blocks, more
    replicas than slots or batches, or where a worker needs more memory than it has.
    """
    replicas = 1 if asked_replicas == "auto" else asked_replicas
    split_sequences(job.num_sequences, job.batch, replicas)
    _require_slots(replicas, resources)
    at_once = resources.num_slots // replicas
    if resources.device_bytes is not None and job.resident_bytes is None:
        # As a worker decides it: weights for the dense pass may take half of what is free.
        job = replace(job, resident_bytes=resources.device_bytes // 2)
    counts = _candidates(len(job.blocks), at_once, handoff) if asked_stages == "auto" else [asked_stages]
    options = [_forecast(job, count, replicas, handoff, links, at_once) for count in counts]
    fastest = min(expected.seconds for _, expected in options)
    topology, expected = next(o for o in options if o[1].seconds <= WORTH_MORE_STAGES * fastest)
    _require_memory(expected, resources)
    lines = [
        _shape_line(topology, resources),
        *(_auto_stages_lines(options, topology) if asked_stages == "auto" else []),
        *(_auto_replicas_lines(job, topology, links, at_once) if asked_replicas == "auto" else []),
        *_turns_lines(topology, at_once),
        *_cost_lines(topology, expected),
    ]
    return topology, expected, lines


def _require_slots(replicas: int, resources: Resources) -> None:
    if resources.num_slots < 1:
        raise ConfigError(
            "the cluster has no room for a worker: no node offers all that one asks for; add machines, or ask "
            "for less for each worker"
        )
    if replicas > resources.num_slots:
        raise ConfigError(
            f"cluster.replicas: the {replicas} replicas of a stage work at the same time, and the cluster has room for "
            f"{resources.num_slots} workers; ask for 1 to {resources.num_slots}, or add machines"
        )


def _require_memory(expected: Forecast, resources: Resources) -> None:
    needed, offered = max(expected.device_bytes), resources.device_bytes
    if offered is not None and needed > offered:
        raise ConfigError(
            f"a worker needs {_gigabytes(needed)} where its blocks run, and has {_gigabytes(offered)}; no topology "
            "changes that, for a worker prunes one block at a time: lower compute.batch, use a recipe that needs less "
            "(wanda), or larger devices"
        )


def _candidates(num_blocks: int, at_once: int, handoff: Handoff) -> list[int]:
    """Return the numbers of stages to compare, ascending.

    Of those with equally long stages only the smallest number is worth a look, and the largest there is room for.
    """
    most = min(at_once, num_blocks)
    if handoff == "pruned":
        return sorted({1, most})
    shortest_for = {-(-num_blocks // length) for length in range(1, num_blocks + 1)}
    return sorted({count for count in shortest_for if count < most} | {most})


def _forecast(
    job: JobShape, num_stages: int, replicas: int, handoff: Handoff, links: Links, at_once: int
) -> tuple[Topology, Forecast]:
    costs = [block.seconds for block in job.blocks]
    topology = Topology(stages=partition(costs, num_stages), replicas=replicas, handoff=handoff)
    return topology, forecast(job, topology, links, at_once)


def _shape_line(topology: Topology, resources: Resources) -> str:
    lengths = [len(stage) for stage in topology.stages]
    each = _count(lengths[0], "block") if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)} blocks"
    return (
        f"{_count(topology.num_stages, 'stage')} of {each} x {_count(topology.replicas, 'replica')}, "
        f"handoff {topology.handoff}; there is room for {_count(resources.num_slots, 'worker')}"
    )


def _auto_stages_lines(options: Sequence[tuple[Topology, Forecast]], chosen: Topology) -> list[str]:
    """Say between what the choice was, and why numbers matter as they do."""
    chances = ", ".join(
        f"{topology.num_stages}: {_time(expected.seconds)}"
        for topology, expected in options
        if topology in (options[0][0], chosen, options[-1][0])
    )
    why = "each waits for the one before it" if chosen.handoff == "pruned" else "all prune at once"
    return [f"stages: auto takes the fewest within 2% of the fastest ({chances}); with handoff {chosen.handoff} {why}"]


def _auto_replicas_lines(job: JobShape, topology: Topology, links: Links, at_once: int) -> list[str]:
    """Say why there is one replica, and what the idle workers could do."""
    line = "replicas: auto takes 1, because more change the result (rounding of Gram matrices, updates of besa)"
    most = min(at_once // topology.num_stages, job.num_batches)
    if most < 2:
        return [line]
    more = forecast(job, replace(topology, replicas=most), links)
    return [f"{line}; with cluster.replicas: {most} it would take {_time(more.seconds)}"]


def _turns_lines(topology: Topology, at_once: int) -> list[str]:
    if topology.num_stages <= at_once:
        return []
    return [
        f"{at_once} of {_count(topology.num_stages, 'stage')} run at the same time, for lack of room; later ones that "
        "were not sent their input make it by running all blocks before their own"
    ]


def _cost_lines(topology: Topology, expected: Forecast) -> list[str]:
    faster = f", {expected.speed_up:.3g} times as fast as one worker ({_time(expected.seconds_alone)})"
    return [
        f"expected: {_time(expected.seconds)}{faster if topology.num_workers > 1 else ''}",
        f"traffic: {_gigabytes(expected.handoff_bytes)} from stage to stage, {_gigabytes(expected.allreduce_bytes)} "
        f"between replicas, {_gigabytes(expected.read_bytes)} of weights read",
        f"memory of a worker: {_gigabytes(max(expected.device_bytes))} where blocks run, "
        f"{_gigabytes(max(expected.host_bytes))} of hidden states",
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.3g} min"
