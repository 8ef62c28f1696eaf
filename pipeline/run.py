"""One process prunes all blocks, going on from the last commit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.allocate import allocate
from pipeline.allocation import Allocation
from pipeline.block_writer import write_block
from pipeline.config import RunConfig
from pipeline.errors import BudgetExceeded, StorageError
from pipeline.evaluate import load_windows
from pipeline.human import human_seconds
from pipeline.inputs import embed_tokens
from pipeline.job import Job, Source, evaluate_job, finish, open_job, open_source, order_of
from pipeline.ledger import RunLock, refuse_foreign
from pipeline.memory import Memory, opened_memory
from pipeline.meter import Stopwatch, resident_bytes
from pipeline.methods.step import PrunedBlock
from pipeline.paging.spool import remove_leftovers, spool_directory
from pipeline.peers import Alone
from pipeline.planning.pace import Speeds
from pipeline.planning.plan import Plan, make_plan, measure_speeds
from pipeline.progress import Progress, StopAsked
from pipeline.records import Commit
from pipeline.report import Report
from pipeline.shard_names import block_shard
from pipeline.shelf import ModelDirectory
from pipeline.stage import run_stage
from pipeline.transaction import Streams, Transaction


def run(config: RunConfig, progress: Progress, stop_asked: StopAsked, *, probe: bool = False) -> Report:
    """Prune a model as configured, or go on where an earlier run of the same configuration ended.

    `probe`: whether to measure this machine first, so that the plan says how long it will take. Raises RunStopped once
    `stop_asked()` is true and the block at hand is committed, and BudgetExceeded, before a block is read, where the
    ceilings are too low; every SecateurError leaves the run directory so that the run can be started again.
    """
    refuse_foreign(config.output)
    with (
        RunLock(config.output),
        open_source(config, progress, stop_asked, run) as source,
        _planned_memory(source, progress, probe) as (plan, memory),
    ):
        job = open_job(source, memory, progress, stop_asked, plan=plan)
        evaluate_job(job, "before")
        prune_blocks(job, allocate(job))
        return finish(job)


@contextmanager
def _planned_memory(source: Source, progress: Progress, probe: bool) -> Iterator[tuple[Plan, Memory]]:
    """Plan a run, and open the memory it is to use."""
    config, directory = source.config, source.checkpoint.directory
    spool = spool_directory(config.memory.spool, config.output)
    remove_leftovers(spool)  # before the plan looks for room
    speeds = _speeds(config, directory, progress) if probe else None
    baseline = resident_bytes()
    plan = make_plan(counted(config, directory), directory, speeds, baseline)
    if plan.refused and config.memory.is_managed:
        raise BudgetExceeded("\n".join(plan.refused))
    device, batch = source.skeleton.device, config.compute.batch
    with opened_memory(config.memory, plan.fit, spool, device, baseline=baseline, batch=batch) as memory:
        yield plan, memory


def _speeds(config: RunConfig, directory: Path, progress: Progress) -> Speeds | None:
    """Measure this machine; where its disk refuses, a run may do without, and a plan without its duration."""
    try:
        return measure_speeds(config, directory)
    except StorageError as error:
        progress.say(f"not measured how fast this machine is, so the plan says no duration: {error.message}")
        return None


def counted(config: RunConfig, directory: Path) -> RunConfig:
    """Count the windows of an evaluation that takes all there are: with ceilings, they are part of the plan."""
    wanted = config.evaluate
    if wanted is None or wanted.windows is not None or not config.memory.is_managed:
        return config
    windows = len(load_windows(wanted, directory))
    return config.model_copy(update={"evaluate": wanted.model_copy(update={"windows": windows})})


def prune_blocks(job: Job, allocation: Allocation) -> None:
    """Prune every block the ledger does not hold yet, each as much as is allocated to it."""
    num_blocks = job.skeleton.num_blocks
    remaining = job.ledger.remaining(num_blocks)
    if not remaining:
        return
    order = order_of(job.config, allocation, job.source.shape)
    memory, shelf = job.memory, ModelDirectory(job.model_directory)
    if not order.recipe.steps and order.width is None:
        _copy_blocks(job, remaining, shelf)
        return
    book = LedgerBook(job, num_committed=remaining.start)
    with ExitStack() as held:
        with memory.phase("embed"):
            tokens_NT = job.source.calibration.tokens_NT
            first = held.enter_context(embed_tokens(job.skeleton, tokens_NT, order.batch, memory.store, "pruned"))
        dense = held.enter_context(memory.store.copy("dense", first)) if order.recipe.needs_dense_stream else None
        streams = Streams(pruned=first, dense=dense)
        transaction = Transaction(job.skeleton, order, streams, shelf, job.progress, Alone(), memory)
        held.enter_context(transaction)
        book.begin()
        run_stage(transaction, range(num_blocks), dict(job.ledger.commits), book)
    job.progress.end()


def _copy_blocks(job: Job, remaining: range, shelf: ModelDirectory) -> None:
    """Write blocks as they are, where no step prunes them: nothing has to be run.

    Raises RunDirectoryError where a committed shard is not the one that was committed, and RunStopped between blocks.
    """
    num_blocks = job.skeleton.num_blocks
    for commit in job.ledger.commits.values():
        with shelf.take_out(commit):
            pass
    job.progress.begin("copy", num_blocks, remaining.start)
    for index in remaining:
        job.progress.phase(index, "commit")
        watch = Stopwatch(job.skeleton.device)
        with watch.phase("commit"), job.memory.phase("commit"):
            path = shelf.directory / block_shard(index, num_blocks)
            records, shard = write_block(job.skeleton, index, [], PrunedBlock(linears={}), path)
        commit = Commit(
            block=index, file=shard.file, sha256=shard.sha256, num_bytes=shard.num_bytes, linears=records, error=0.0,
            seconds=dict(watch.seconds),
        )  # fmt: skip
        job.ledger.commit(commit)
        job.progress.advance(index, "")
        job.stop_if_asked()
    job.progress.end()


@dataclass(slots=True)
class LedgerBook:
    """Writes what is done into the ledger, and shows it."""

    job: Job
    num_committed: int
    """Blocks committed by earlier runs: they are replayed first."""

    def begin(self) -> None:
        """Show the first task: replaying, where there is something to replay, else pruning."""
        if self.num_committed == 0:
            self._begin_pruning()
            return
        num_blocks = self.job.skeleton.num_blocks
        self.job.progress.say(f"{self.num_committed} of {num_blocks} blocks are committed; going on from there")
        self.job.progress.begin("replay", self.num_committed, 0)

    def replayed(self, block: int) -> None:
        """Show a replayed block; after the last one pruning begins."""
        self.job.stop_if_asked()
        self.job.progress.advance(block, "")
        if block + 1 == self.num_committed:
            self.job.progress.end()
            self._begin_pruning()

    def commit(self, commit: Commit | None) -> None:
        """Make a commit durable. Raises RunStopped where a stop was asked for."""
        assert commit is not None, "a run in one process has no other replicas"
        self.job.ledger.commit(commit)
        self.job.stop_if_asked()

    def done(self, block: int, watch: Stopwatch) -> None:
        """Record what propagating took, and show the block."""
        if "propagate" in watch.seconds:
            self.job.ledger.record(f"propagate.{block}", watch.seconds["propagate"])
        error = self.job.ledger.commits[block].error
        self.job.progress.advance(block, f"error {error:.4f}, {human_seconds(sum(watch.seconds.values()))}")

    def _begin_pruning(self) -> None:
        self.job.progress.say(f"calibration: {self.job.source.calibration.description}")
        self.job.progress.begin("prune", self.job.skeleton.num_blocks, self.num_committed)
