"""What a long run tells while it works. The command line shows it; the pipeline only says it."""

from collections.abc import Callable, Mapping
from typing import Protocol

StopAsked = Callable[[], bool]
"""Asked between blocks: true once somebody wants the run to stop."""


Say = Callable[[str], None]
"""Tells whoever waits a line."""


class Progress(Protocol):
    """Receives the events of a run, in order."""

    def begin(self, task: str, total: int, done: int) -> None:
        """Start a task of `total` blocks, of which `done` are already behind us."""

    def phase(self, block: int, name: str) -> None:
        """Enter a phase (read, collect, prune, commit, propagate) of a block."""

    def figures(self, figures: Mapping[str, float]) -> None:
        """Show figures of the present phase (loss, sparsity)."""

    def advance(self, block: int, summary: str) -> None:
        """Report one block done."""

    def end(self) -> None:
        """Finish the present task."""

    def say(self, text: str) -> None:
        """Report something that happened once."""


class Silent:
    """A progress that says nothing."""

    def begin(self, task: str, total: int, done: int) -> None:
        """Say nothing."""

    def phase(self, block: int, name: str) -> None:
        """Say nothing."""

    def figures(self, figures: Mapping[str, float]) -> None:
        """Say nothing."""

    def advance(self, block: int, summary: str) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""
