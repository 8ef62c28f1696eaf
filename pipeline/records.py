"""What a ledger records: the settings of a run, and every block that is done."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from pydantic import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """What was done to one linear; its counts are of weights."""

    pruned: int  # that the keep mask drops
    zeros: int  # as written: at least `pruned`, more where kept weights were zero already
    numel: int
    rewritten: bool  # kept weights were updated too, not only masked
    notes: dict[str, float]  # what the method tells, e.g. the damping it needed
    sparsity: str  # what it was pruned to: a fraction such as 0.5, or a pattern such as 2:4

    def __post_init__(self) -> None:
        counts = f"{self.pruned} pruned, {self.zeros} zeros, {self.numel} weights"
        assert 0 <= self.pruned <= self.zeros <= self.numel, f"impossible counts: {counts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsRecord:
    """What was taken out of one block's attention, before its neurons."""

    unit: Literal["group", "query"]  # what went as one
    num_units: int  # of the dense block
    kept: str  # which of them are left: hexadecimal, a bit each from the first on
    num_heads: int  # query heads that are left
    num_groups: int  # heads of keys and values that are left
    rewritten: bool  # what is left has new values where it reads the heads
    notes: dict[str, float]  # what the method tells, e.g. errors on held-out sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRecord:
    """What was taken out of one block, before anything else was done to it."""

    num_neurons: int  # of the dense block
    kept: str  # which of them are left: hexadecimal, a bit each from the first on
    removed: int  # parameters that are gone
    rewritten: bool  # what is left has new values where it reads the neurons
    notes: dict[str, float]  # what the method tells, e.g. errors on held-out sequences
    heads: HeadsRecord | None = None  # of its attention, where heads went too

    @property
    def width(self) -> int:
        """How many neurons are left."""
        return int(self.kept, 16).bit_count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One block is done: its shard is on disk, whole and final."""

    block: int
    file: str  # the shard's path, relative, and inside the directory it is relative to
    sha256: str  # of the shard's bytes, in hex
    num_bytes: int
    linears: dict[str, LinearRecord]
    error: float  # relative squared error of the pruned block's output on the block's own input
    seconds: dict[str, float]  # by phase
    tuned: list[str] = field(default_factory=list)  # other parameters of the block (norms, biases) with new values
    cut: CutRecord | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file)
        safe = path.parts and not path.is_absolute() and ".." not in path.parts
        assert safe, f"{self.file!r} is no path inside a directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What determines the bytes a run writes, and the versions it ran on, which are never compared."""

    config: dict[str, JsonValue]  # resolved, as plain nested data
    source: str  # fingerprint of the source checkpoint
    calibration: str  # sha256 of the calibration tokens
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """sha256 (hex) of config, source and calibration."""
        identity = {"config": self.config, "source": self.source, "calibration": self.calibration}
        return hashlib.sha256(canonical(identity)).hexdigest()


def canonical(value: object) -> bytes:
    """The one JSON spelling of plain data: sorted keys, no spaces, ASCII. `ValueError` at NaN and Inf."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
