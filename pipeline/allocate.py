"""What each block of a job is to lose: as its ledger says, or as a survey of the dense model finds, once.

What is found is recorded before the first block is pruned, and every session of the run goes by the record.
"""

from dataclasses import asdict, dataclass, replace

from pydantic import TypeAdapter

from pipeline.allocation import Allocation, by_outliers, held_at_bounds
from pipeline.allocation_config import OwlConfig
from pipeline.devices import empty_cache
from pipeline.job import Job
from pipeline.order import check_divides, linears_to_prune
from pipeline.outliers import OutlierCounter
from pipeline.sparsity import Sparsity, parse_sparsity
from pipeline.survey import survey
from pipeline.width import weights_gone

ALLOCATION = "allocation"
"""The ledger's note of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationNote:
    """What the ledger says of an allocation that took a survey; lists are by block."""

    sparsity: list[str]
    """Fractions such as 0.512345, or patterns such as 3:8."""

    outlier_percentage: list[float]
    held_at_bounds: list[int]
    """Blocks that would lose less or more than a block may, were they not kept from it."""


def allocate(job: Job) -> Allocation:
    """Return how much each block of a job is to lose; surveys the model where that is needed and not known yet.

    Raises ConfigError where a block cannot be pruned as asked, and RunStopped between blocks of a survey.
    """
    prune, ledger = job.config.prune, job.ledger
    if prune.allocation.owl is None:
        return Allocation(target=prune.target)
    if ALLOCATION not in ledger.notes:
        ledger.record(ALLOCATION, asdict(_allocate_by_outliers(job, prune.allocation.owl)))
    note = TypeAdapter(AllocationNote).validate_python(ledger.notes[ALLOCATION])
    job.progress.say(_told(note, prune.target))
    return Allocation.from_data(prune.target, note.sparsity)


def _allocate_by_outliers(job: Job, owl: OwlConfig) -> AllocationNote:
    """Survey the model, and spread its sparsity by what is found."""
    prune, skeleton = job.config.prune, job.skeleton
    for block in skeleton.blocks:  # what cannot be pruned so is not surveyed first
        check_divides(linears_to_prune(block, prune.skip), block, prune.target)
    counter = OutlierCounter(owl.threshold)
    survey(
        skeleton, job.source.calibration.tokens_NT, [counter], skip=prune.skip, batch=job.config.compute.batch,
        memory=job.memory, progress=job.progress, between_blocks=job.stop_if_asked,
    )  # fmt: skip
    empty_cache(skeleton.device)  # workers may be about to use it
    gone = weights_gone(skeleton)
    found = [replace(block, num_gone=gone[index]) for index, block in enumerate(counter.found)]
    return AllocationNote(
        sparsity=by_outliers(prune.target, found, owl.spread).as_data(skeleton.num_blocks),
        outlier_percentage=[float(block.percentage) for block in found],
        held_at_bounds=held_at_bounds(prune.target, found, owl.spread),
    )


def _told(note: AllocationNote, target: Sparsity) -> str:
    """Say between what the blocks lie, and which of them a bound keeps there."""
    chosen = sorted(map(parse_sparsity, note.sparsity), key=lambda sparsity: sparsity.fraction)
    line = f"allocation: blocks are pruned to between {chosen[0]} and {chosen[-1]}, {target} in all"
    if note.held_at_bounds:
        held = ", ".join(map(str, note.held_at_bounds))
        line += (
            f"; of block {held} the spread asks for less or more than a block may lose, and the others make up for it"
        )
    return line
