"""However a run is stopped, killed or given memory, it ends with the same bytes: what tests of that share.

Each takes a job, and carries it out more than once, in directories beside the one that it names.
"""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunStopped
from pipeline.verify import verify
from tests.integration.processes import Child, prune_until_write
from tests.integration.support import SILENT, carry_out, committed, outcome

Job = dict[str, Any]


def check_stopped(own: Job, blocks: Sequence[int] = (1, 2)) -> None:
    """Stop a run after so many committed blocks, one after another; what it ends with is right."""
    one, many = _beside(own, "one"), _beside(own, "many")
    carry_out(one)
    for num_blocks in blocks:
        with pytest.raises(RunStopped):
            carry_out(many, stop=committed(Path(many["output"]), num_blocks))
    carry_out(many)
    _check_same(one, many)
    verify(Path(many["output"]), Path(own["model"]), SILENT)


def check_killed(own: Job, deadly: Sequence[int] = (5, 17, 29)) -> None:
    """Kill a run (SIGKILL) in the middle of the so-manieth thing that each of its processes makes durable."""
    one, many = _beside(own, "one"), _beside(own, "many")
    carry_out(one)
    for instant in deadly:
        with Child(prune_until_write, many, instant) as child:
            child.wait_for_report()
            assert child.exit_status() == -signal.SIGKILL
    carry_out(many)
    _check_same(one, many)


def check_memory(own: Job) -> None:
    """Keep hidden states where there is room, on disk, and in host memory under a ceiling; spools are gone then."""
    spool = Path(own["output"]).parent / "fast"
    ways = {
        "plain": {},
        "disk": {"activations": "disk", "spool": str(spool)},
        "paged": {"activations": "disk", "host": "8GiB"},
        "little": {"activations": "host", "host": "2GiB"},
    }
    jobs = {name: {**_beside(own, name), "memory": memory} for name, memory in ways.items()}
    for job in jobs.values():
        carry_out(job)
    for name in ("disk", "paged", "little"):
        _check_same(jobs["plain"], jobs[name])
    assert not any(spool.iterdir())
    assert not (Path(jobs["paged"]["output"]) / "spool").exists()


def _beside(own: Job, name: str) -> Job:
    return {**own, "output": str(Path(own["output"]).with_name(name))}


def _check_same(one: Job, other: Job) -> None:
    """Their bytes and commits are the same, and so is all that their shapes were chosen by."""
    directories = [Path(job["output"]) for job in (one, other)]
    assert outcome(directories[1]) == outcome(directories[0])
    shapes = [json.loads(path.read_text()) for d in directories if (path := d / "shape.json").exists()]
    assert len(shapes) in (0, 2)
    assert shapes[1:] == shapes[:-1]
