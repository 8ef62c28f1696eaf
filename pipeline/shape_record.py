"""What a run has measured to choose the shape of its output, and what it chose: `shape.json` in the run directory.

    {"settings": what the choice depends on,
     "measured": {"": figures of the dense model, "4 7": of the one without blocks 4 and 7,
                  "attentions 2 5": of the one without these blocks' attention, …,
                  "2 blocks go": perplexity of a trial that dropped two, and of the dense model, …},
     "order": blocks in the order they go, "kept": blocks that stay, "width": …}

Every measurement is durable as soon as it is made, so that a search that was stopped goes on; the choice follows from
them, and is held against what an earlier session has written.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from pipeline.durable import write_atomically
from pipeline.errors import ConfigChanged, RunDirectoryError
from pipeline.ledger import SHAPE_NAME
from pipeline.records import canonical
from pipeline.shape import Shape

Figures = list[float]


def num_kept(run_directory: Path) -> int | None:
    """Return how many blocks an earlier session has chosen to keep; None before, and of what is no JSON of ours."""
    try:
        return len(json.loads((run_directory / SHAPE_NAME).read_bytes())["kept"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


class ShapeRecord:
    """One run's shape.json; the caller holds the run directory's lock."""

    def __init__(self, run_directory: Path, settings: Mapping[str, JsonValue]) -> None:
        """Read what earlier sessions have measured.

        Raises ConfigChanged where they had other settings, RunDirectoryError where the file is not one of ours.
        """
        self.path = run_directory / SHAPE_NAME
        self._settings = dict(settings)
        self._chosen: dict[str, JsonValue] = {}
        self.measured: dict[str, Figures] = {}
        if self.path.is_file():
            self._take(self.path.read_bytes())

    def measure(self, name: str, figures_of: Callable[[], Figures]) -> Figures:
        """Return the figures that go by a name: measured now, and durable at once, where they are not known."""
        if name not in self.measured:
            self.measured[name] = figures_of()
            self._write()
        return self.measured[name]

    def begun(self) -> bool:
        """Tell whether an earlier session has begun with these settings; from now on one has."""
        if self.path.is_file():
            return True
        self._write()
        return False

    def settle(self, shape: Shape, order: Sequence[int]) -> None:
        """Keep the choice; raises RunDirectoryError where the file has another than follows from its figures."""
        chosen: dict[str, JsonValue] = {"order": list(order), **shape.as_data()}
        if self._chosen and canonical(self._chosen) != canonical(chosen):
            raise RunDirectoryError(
                f"{self.path} keeps the blocks {_told(self._chosen)}, and its own figures say {_told(chosen)}: it was "
                "changed; restore it, or start again in a new output directory"
            )
        if not self._chosen:
            self._chosen = chosen
            self._write()

    def _write(self) -> None:
        content = {"settings": self._settings, "measured": self.measured, **self._chosen}
        write_atomically(self.path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")

    def _take(self, content: bytes) -> None:
        try:
            found = json.loads(content)
            written_with = found.pop("settings")
            self.measured = {str(name): [float(f) for f in figures] for name, figures in found.pop("measured").items()}
            self._chosen = dict(found)
            changed = [name for name in self._settings if written_with.get(name) != self._settings[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(
                f"{self.path} is not what a run has written ({error!r}); restore it, or remove it where no block is "
                "committed, and the blocks are chosen anew"
            ) from error
        if changed:
            differences = ", ".join(f"{name} {written_with.get(name)}, now {self._settings[name]}" for name in changed)
            raise ConfigChanged(
                f"{self.path} was found with other settings, or for another model: {differences}; go back to them, or "
                "name another output directory"
            )


def listed(blocks: Iterable[int]) -> str:
    """Return the name, or its end, of what is measured without some blocks or their attentions."""
    return " ".join(map(str, sorted(blocks)))


def _told(chosen: Mapping[str, JsonValue]) -> str:
    width = chosen.get("width")
    return str(chosen.get("kept")) + ("" if width is None else f" with {width} neurons")
