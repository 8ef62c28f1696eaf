"""A ledger without a disk, commits to put into it, and a progress that remembers what it was told."""

import hashlib
from collections.abc import Mapping

from pipeline.ledger import Ledger
from pipeline.records import Commit, LinearRecord


def make_commit(block: int) -> Commit:
    linear = LinearRecord(pruned=5, zeros=6, numel=10, rewritten=False, notes={}, sparsity="0.5")
    return Commit(
        block=block, file=f"block-{block}.safetensors", sha256=hashlib.sha256(bytes([block])).hexdigest(),
        num_bytes=1000 + block, linears={"q": linear}, error=0.25, seconds={"prune": 1.5},
    )  # fmt: skip


class MemoryLedger(Ledger):
    """Its rules are the real one's."""

    def __init__(self, blocks: range = range(0)) -> None:
        self.commits = {block: make_commit(block) for block in blocks}
        self.notes = {}

    def _append(self, fields: object) -> None:
        pass


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def begin(self, task: str, total: int, done: int) -> None:
        self.calls.append(("begin", task, total, done))

    def phase(self, block: int, name: str) -> None:
        self.calls.append(("phase", block, name))

    def figures(self, figures: Mapping[str, float]) -> None:
        self.calls.append(("figures", figures))

    def advance(self, block: int, summary: str) -> None:
        self.calls.append(("advance", block, summary))

    def end(self) -> None:
        self.calls.append(("end",))

    def say(self, text: str) -> None:
        self.calls.append(("say", text))

    @property
    def said(self) -> list[object]:
        return [call[1] for call in self.calls if call[0] == "say"]
