"""A stage: a contiguous range of blocks, replayed where they are committed and pruned where they are not."""

from collections.abc import Mapping
from typing import Protocol

from pipeline.activations import Outlet
from pipeline.meter import Stopwatch
from pipeline.records import Commit
from pipeline.transaction import Transaction


class Book(Protocol):
    """Is told what a stage has done, in order."""

    def replayed(self, block: int) -> None:
        """Note that a committed block has run once more. May raise RunStopped."""

    def commit(self, commit: Commit | None) -> None:
        """Return once the block's commit is durable, with None where another replica has made it.

        May raise RunStopped: the block is done, the stage goes no further.
        """

    def done(self, block: int, watch: Stopwatch) -> None:
        """Note that a block is behind us, and what its phases took."""


def run_stage(
    transaction: Transaction,
    blocks: range,
    committed: Mapping[int, Commit],
    book: Book,
    outlet: Outlet | None = None,
) -> None:
    """Work through `blocks`; the outputs of the last one are handed on as they appear, or never made.

    `transaction` stands at the first block. Nothing is propagated, or handed on, before it is committed.
    """
    for block in blocks:
        is_last = block == blocks[-1]
        if block in committed:
            if not is_last or outlet is not None:
                transaction.replay(block, committed[block], outlet if is_last else None)
            book.replayed(block)
            continue
        following = range(block + 1, blocks.stop)
        commit, watch = transaction.prune(block, following)
        book.commit(commit)
        if is_last and outlet is None:
            transaction.drop(block)
        else:
            transaction.propagate(block, watch, outlet if is_last else None, following)
        book.done(block, watch)
