"""Two nodes that share no directory: shards travel to the run directory and back, hidden states within a window."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import LlamaConfig

from pipeline.errors import RunStopped
from pipeline.progress import Silent
from tests.cluster.object_store import watched_stores
from tests.integration.clusters import (
    BESA_DENSE,
    Listener,
    alone,
    carry_out_there,
    is_verified,
    six_blocks,
    spread,
    two_nodes,
)
from tests.integration.support import carry_out, committed, never, outcome
from tests.tiny import FAMILIES, GROUPED, save_tiny, some_text

RECIPE = [BESA_DENSE, "sparsegpt"]

BATCH, TOKENS, FEATURES = 2, 320, 512
BATCH_BYTES = BATCH * TOKENS * FEATURES * torch.float32.itemsize
WINDOW = 3
MOST_SEQUENCES = 32


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The nodes' temporary directories."""
    with two_nodes(tmp_path_factory.mktemp("nodes")) as roots:
        yield roots


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that this process did alone, beside its source."""
    source = six_blocks(tmp_path_factory.mktemp("nodes"))
    carry_out(alone(source, source.parent / "alone", RECIPE))
    return source.parent / "alone"


def scratch_in(roots: tuple[Path, Path]) -> set[Path]:
    """The nodes where a worker has a directory for its shards now, by their temporary directories."""
    return {root for root in roots if any(root.glob("secateur-*"))}


def test_shards_are_sent_to_the_run_directory_and_fetched_back_after_a_stop(
    roots: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    source, progress, used = undisturbed.parent / "source", Listener(), set[Path]()
    settings = spread(alone(source, tmp_path, RECIPE), stages=2, shards="sent")

    def looking(enough: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: used.update(scratch_in(roots)) or enough()

    with pytest.raises(RunStopped, match=r"[12] of 6 blocks are committed"):
        carry_out_there(settings, progress, looking(committed(tmp_path, 1)))
    assert "nodes do not share the run directory: shards are sent to it" in progress.said
    carry_out_there(settings, progress, looking(never))
    replayed = r"stage 0 starts: input embedded, replays blocks? (0, prunes on from 1|0-1, prunes on from 2)"
    assert any(re.fullmatch(replayed, line) for line in progress.said)
    assert (used, scratch_in(roots)) == (set(roots), set())
    assert outcome(tmp_path) == outcome(undisturbed)
    assert is_verified(tmp_path, source)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two blocks with many features: a batch of its hidden states is more than 1 MB."""
    base = tmp_path_factory.mktemp("wide")
    (base / "text.txt").write_text(some_text(MOST_SEQUENCES * TOKENS), encoding="utf-8")
    shape = {"hidden_size": FEATURES, "num_hidden_layers": 2, "max_position_embeddings": TOKENS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "wide", LlamaConfig(**{**GROUPED, **shape}))
        save_tiny("wide", base / "source", shard="1GB")
    return base / "source"


def wide_job(wide: Path, output: Path, sequences: int) -> dict[str, Any]:
    calibration = {"source": {"text": str(wide.parent / "text.txt")}, "sequences": sequences, "tokens": TOKENS}
    return alone(wide, output, calibration=calibration, compute={"threads": 1, "batch": BATCH})


class Squatter:
    """Has a node to itself, so that no stage finds a place there."""

    def here(self) -> None:
        """Return once begun."""


class Opener(Silent):
    """Makes room on the second node once the first stage begins to send."""

    def __init__(self, sending: str) -> None:
        self._sending = sending
        self._squatter = ray.remote(num_cpus=1, resources={"second": 1})(Squatter).remote()
        ray.get(self._squatter.here.remote())

    def phase(self, block: int, name: str) -> None:
        if name == self._sending:
            ray.kill(self._squatter)


@pytest.mark.parametrize(
    ("sequences", "handoff", "sending"),
    [(8, "pruned", "stage 0: propagate"), (32, "pruned", "stage 0: propagate"), (32, "dense", "stage 0: dense")],
)
def test_the_object_stores_hold_a_window_of_batches_however_many_there_are(
    sequences: int, handoff: str, sending: str, roots: tuple[Path, Path], wide: Path, tmp_path: Path
) -> None:
    """The second stage finds a place only when the first one sends: batches pile up for it while it begins."""
    settings = spread(wide_job(wide, tmp_path, sequences), stages=2, window=WINDOW, handoff=handoff)
    with watched_stores() as stores:
        before = stores.created_bytes()
        carry_out_there(settings, Opener(sending))
        assert stores.created_bytes() - before >= sequences // BATCH * BATCH_BYTES
    # Of a window's places one is for a batch that is taken and on its way out.
    assert (WINDOW - 1) * BATCH_BYTES <= max(stores.peak_bytes.values()) <= 1.1 * WINDOW * BATCH_BYTES
