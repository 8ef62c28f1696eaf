"""What a run will need and how long it will take, from its configuration and the checkpoint's headers alone.

    plan = make_plan(config, directory, measure_speeds(config, directory))
    plan.choice         what the run does with memory
    plan.refused        why it cannot, and what would do

The plan and the run share every number: what is chosen here is what the run does.
"""

import shutil
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.attention import HeadLayout
from pipeline.budget import Place
from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig
from pipeline.devices import choose_device, choose_dtype, free_bytes
from pipeline.errors import BudgetExceeded
from pipeline.head_count import heads_of
from pipeline.memory_config import MemoryConfig
from pipeline.paging.engines import open_pager
from pipeline.paging.spool import existing
from pipeline.planning.choosing import Choosing, part_idle
from pipeline.planning.fitting import Limit, Room, choose, preferences, refusal
from pipeline.planning.footprint import Choice, Fit, footprint
from pipeline.planning.held import Phase, working_sets
from pipeline.planning.pace import Cost, Speeds, costs, probe_speeds
from pipeline.planning.runs import forward_passes, outside_bytes, planned_scale, trying
from pipeline.planning.scale import scale_of
from pipeline.planning.work import weights_of
from pipeline.prunable import require_prunable
from pipeline.skeleton import Skeleton
from pipeline.width import bytes_left, mean_width, part_gone

LATER_BYTES = 50 << 20
"""Resident once a run is under way and not yet where it is planned: the tokenizer, libraries loaded when needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPhase:
    """One phase of a run."""

    name: str
    device_bytes: int
    host_bytes: int
    spool_bytes: int
    held: dict[str, int]
    """What is held, in bytes, wherever it is."""

    bytes_read: int
    """From disk, over the whole run."""

    bytes_written: int
    flops: float
    seconds: float | None
    bottleneck: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Figures of a run, before any weight is read."""

    model_type: str
    num_blocks: int
    block_weights: int
    """Prunable weights of the largest block."""

    device: str
    dtype: str
    choice: Choice
    """How memory is used; where the run is refused, the way that takes the least of it."""

    refused: tuple[str, ...]
    """Why the run cannot be: fact, numbers, rule and way out of each; empty where it can."""

    limits: dict[str, int]
    """The most that may be held, by place."""

    device_bytes: int
    """Peak of the device's memory; 0 on a CPU, whose memory is the host's."""

    host_bytes: int
    """Peak of resident host memory, the interpreter and its libraries included."""

    spool_bytes: int
    output_bytes: int
    """Size of the output."""

    phases: tuple[PlannedPhase, ...]
    working_sets: dict[str, dict[Place, int]]
    """What each phase takes from the run's budget for as long as it lasts."""

    bytes_read: int
    """From disk, over the whole run."""

    bytes_written: int
    flops: float
    seconds: float | None
    """None where speeds were not measured."""

    bottleneck: str | None
    """What most of the time is spent waiting for: `disk`, `copying` or `computing`."""

    forward_passes: float
    """Passes of all calibration sequences through all blocks, counting a backward pass as two."""

    part_gone: float
    """Of all blocks' parameters: what goes for good with whole blocks, heads and neurons, rounded widths and all."""

    num_trials: int
    """Runs that try splits between whole blocks and neurons first, counted in all figures; the rest of them is of the
    run that follows, with as many blocks as may be."""

    part_idle: float
    """Of all blocks' parameters: those of attentions that are silenced, which take as much room and time as before."""

    width: int | None
    """Neurons that are left in every block, where some of them go; the mean, where widths differ."""

    widths_differ: bool
    """Whether each block gets a width of its own, which is not known yet."""

    heads: HeadLayout | None
    """Heads that are left in every attention, where some of them go."""

    @property
    def left(self) -> str:
        """What is left of the blocks, in words."""
        about, heads = "about " if self.widths_differ else "", f" and {self.heads}" if self.heads else ""
        each = f" of {about}{self.width:,} neurons{heads}" if self.width else ""
        idle = f", {self.part_idle:.2%} become idle with silenced attentions" if self.part_idle else ""
        return f"{self.num_blocks} blocks{each}; {self.part_gone:.2%} of all blocks' parameters go{idle}"

    @property
    def fit(self) -> Fit:
        """How the run uses memory."""
        return Fit(choice=self.choice, working_sets=self.working_sets)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def make_plan(config: RunConfig, directory: Path, speeds: Speeds | None, baseline: int | None = None) -> Plan:
    """Work out what a run needs; reads headers and config.json, no weight.

    Raises ConfigError where this model cannot be pruned as asked.

    `baseline`: host bytes that the process holds before the run takes any; by default what this one holds now, and
    what it will load yet.
    """
    with closing(Checkpoint.open(directory)) as checkpoint:
        device = choose_device(config.compute.device)
        dtype = choose_dtype(config.compute.dtype, device, checkpoint.matrix_dtype())
        dense = Skeleton(checkpoint, device, dtype)
        require_prunable(config, dense)
        skeleton, scale = planned_scale(config, dense)
        shape = config.prune.steps.shape
        held = psutil.Process().memory_info().rss + LATER_BYTES if baseline is None else baseline
        room = room_for(config, device, held)
        choice = choose(scale, room, config.memory.activations)
        refused = () if choice else refusal(scale, room, config.memory.activations, config.prune.target)
        choice = choice or list(preferences(scale, room, config.memory.activations))[-1]
        trials = trying(config, dense, choice, room, speeds)
        phases = footprint(scale, choice, held)
        spent = costs(scale, choice, speeds, outside_bytes(skeleton, scale))
        return Plan(
            model_type=skeleton.model.config.model_type,
            num_blocks=skeleton.num_blocks,
            block_weights=sum(weights_of(group) for group in scale.work.groups),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            choice=choice,
            refused=refused or (trials.refused if trials else ()),
            limits={place: limit.num_bytes for place, limit in room.limits.items()},
            output_bytes=bytes_left(skeleton),
            part_gone=part_gone(dense, skeleton),
            part_idle=part_idle(config, dense),
            width=mean_width(skeleton),
            widths_differ=shape is not None and shape.widths_differ,
            heads=heads_of(skeleton),
            working_sets=working_sets(phases),
            forward_passes=forward_passes(scale) + scale.surveys + (trials.forward_passes if trials else 0.0),
            num_trials=trials.num_runs if trials else 0,
            **(_totals((*phases, trials.largest), [trials.cost, *spent]) if trials else _totals(phases, spent)),
        )


def fit_for(
    config: RunConfig,
    skeleton: Skeleton,
    num_sequences: int,
    baseline: int,
    *,
    surveys: bool = False,
    choosing: Choosing | None = None,
) -> Fit:
    """Return how one process of a cluster uses memory for its part of the sequences; raises BudgetExceeded.

    surveys: whether it is the one that surveys the model, if that is asked for; choosing: what it runs, where it is the
    one that chooses which blocks go.
    """
    scale = scale_of(config, skeleton)
    work = replace(scale.work, num_sequences=num_sequences)
    scale = replace(
        scale, work=work, windows=None, generation=None, surveys=surveys and scale.surveys, choosing=choosing
    )
    room, asked = room_for(config, skeleton.device, baseline), config.memory.activations
    choice = choose(scale, room, asked)
    if choice is None:
        raise BudgetExceeded("\n".join(refusal(scale, room, asked, config.prune.target)))
    return Fit(choice=choice, working_sets=working_sets(footprint(scale, choice, baseline)))


def measure_speeds(config: RunConfig, directory: Path) -> Speeds:
    """Measure this machine as a run will use it, in some seconds; raises StorageError where its disk refuses."""
    device, place = choose_device(config.compute.device), existing(config.memory.spool or config.output)
    with closing(Checkpoint.open(directory)) as checkpoint:
        dtype = choose_dtype(config.compute.dtype, device, checkpoint.matrix_dtype())
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    with closing(open_pager(config.memory.io, place)) as pager:
        return probe_speeds(place, pager, device, dtype)


def room_for(config: RunConfig, device: torch.device, baseline: int) -> Room:
    """Return what a run may use: its ceilings, and where there are none what this machine has free."""
    memory, unified = config.memory, device.type == "cpu"
    free = psutil.virtual_memory().available
    host = _limit(memory.host, "memory.host", free + psutil.Process().memory_info().rss)
    limits: dict[Place, Limit] = {"host": host, "spool": _spool_limit(memory, config.output)}
    if unified and memory.device is not None:
        limits["host"] = min(host, Limit(num_bytes=memory.device, setting="memory.device"), key=lambda n: n.num_bytes)
    if not unified:
        limits["device"] = _limit(memory.device, "memory.device", free_bytes(device))
    return Room(limits=limits, baseline=baseline, free_host=free, managed=memory.is_managed)


def _limit(ceiling: int | None, setting: str, has: int) -> Limit:
    return Limit(num_bytes=has) if ceiling is None else Limit(num_bytes=ceiling, setting=setting)


def _spool_limit(memory: MemoryConfig, output: Path) -> Limit:
    free = Limit(num_bytes=shutil.disk_usage(existing(memory.spool or output)).free)
    ceiling = _limit(memory.spool_limit, "memory.spool_limit", free.num_bytes)
    return min(ceiling, free, key=lambda limit: limit.num_bytes)


def _totals(phases: tuple[Phase, ...], spent: list[Cost]) -> dict[str, Any]:
    """Return the fields of a plan that its phases make up."""
    footprints = {phase.name: phase for phase in phases}
    planned = tuple(_planned(cost, footprints.get(cost.name)) for cost in spent)
    timed = [cost.seconds for cost in spent if cost.seconds is not None]
    waits: dict[str, float] = {}
    for cost in spent:
        if cost.bottleneck is not None:
            waits[cost.bottleneck] = waits.get(cost.bottleneck, 0.0) + (cost.seconds or 0.0)
    return {
        "phases": planned,
        "device_bytes": max(phase.device_bytes for phase in planned),
        "host_bytes": max(phase.host_bytes for phase in planned),
        "spool_bytes": max(phase.spool_bytes for phase in planned),
        "bytes_read": sum(cost.disk_read for cost in spent),
        "bytes_written": sum(cost.disk_written for cost in spent),
        "flops": sum(cost.flops for cost in spent),
        "seconds": sum(timed) if timed else None,
        "bottleneck": max(waits, key=lambda name: waits[name]) if waits else None,
    }


def _planned(cost: Cost, phase: Phase | None) -> PlannedPhase:
    """Join what a phase takes with what it holds; assembling holds nothing that grows with the model."""
    return PlannedPhase(
        name=cost.name,
        device_bytes=phase.bytes_in("device") if phase else 0,
        host_bytes=phase.bytes_in("host") if phase else 0,
        spool_bytes=phase.bytes_in("spool") if phase else 0,
        held={held.what: held.num_bytes for held in phase.held} if phase else {},
        bytes_read=cost.disk_read,
        bytes_written=cost.disk_written,
        flops=cost.flops,
        seconds=cost.seconds,
        bottleneck=cost.bottleneck,
    )
