"""What is held during a phase: how much, where, and until when."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.budget import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One thing that is held."""

    place: Place
    what: str
    num_bytes: int
    outlasts: bool = False
    """Whether it is there before the phase, or taken from the budget by what makes it; else it ends with the phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """All that is held during one phase."""

    name: str
    held: tuple[Held, ...]

    def bytes_in(self, place: Place) -> int:
        """Bytes held in one place."""
        return sum(held.num_bytes for held in self.held if held.place == place)


def on_device(what: str, num_bytes: int, *, outlasts: bool = False) -> Held:
    """Return something held where blocks run."""
    return Held(place="device", what=what, num_bytes=num_bytes, outlasts=outlasts)


def on_host(what: str, num_bytes: int, *, outlasts: bool = False) -> Held:
    """Return something held in host memory."""
    return Held(place="host", what=what, num_bytes=num_bytes, outlasts=outlasts)


def working_sets(phases: Iterable[Phase]) -> dict[str, dict[Place, int]]:
    """Return what each phase holds for as long as it lasts, by its name and place."""
    places: tuple[Place, ...] = ("device", "host")
    return {
        phase.name: {p: sum(h.num_bytes for h in phase.held if h.place == p and not h.outlasts) for p in places}
        for phase in phases
    }
