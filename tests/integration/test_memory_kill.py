"""A run killed while it writes hidden states behind: the same bytes in the end, and nothing of it left on disk."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunStopped
from pipeline.paging.engines import why_not_aio
from tests.integration.paged_runs import DISK, ends_as, num_committed, settings
from tests.integration.paged_runs import source as source
from tests.integration.paged_runs import undisturbed as undisturbed
from tests.integration.processes import Child, prune, prune_until_call, prune_until_spooled
from tests.integration.support import carry_out, digests, outcome

KILLS = 8
SPOOLED = {"pruned", "dense"}


def kill_in_the_middle_of_a_write(begun: dict[str, Any], instants: random.Random) -> int:
    with Child(prune_until_spooled, begun, instants.randrange(1, 25)) as child:
        return child.exit_status()


def kill_at_any_time(begun: dict[str, Any], instants: random.Random) -> int:
    with Child(prune, begun) as child:
        child.wait_for_report()
        child.process.join(instants.uniform(0, 0.5))
    assert child.process.exitcode is not None
    return child.process.exitcode


@pytest.mark.parametrize(("kill", "surely_left"), [(kill_in_the_middle_of_a_write, SPOOLED), (kill_at_any_time, set())])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes_and_removes_its_own_spool_only(
    kill: Callable[[dict[str, Any], random.Random], int],
    surely_left: set[str],
    source: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
) -> None:
    spools = tmp_path / "spools"
    (spools / "secateur-of-another-run").mkdir(parents=True)
    for name in ("mine.bin", "secateur-of-another-run/pruned"):
        (spools / name).write_bytes(b"not yours")
    foreign, instants, found = digests(spools), random.Random(0), set()
    begun = settings(source, tmp_path / "run", memory={**DISK, "spool": str(spools)})
    for _ in range(KILLS):
        status = kill(begun, instants)
        assert status in (0, -signal.SIGKILL)
        if status != 0:
            found |= digests(spools).keys() - foreign.keys()
    assert surely_left <= {Path(file).name for file in found} <= SPOOLED
    carry_out(begun)
    assert outcome(tmp_path / "run") == undisturbed
    assert digests(spools) == foreign


def test_a_killed_run_goes_on_in_memory(source: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with Child(prune_until_spooled, settings(source, tmp_path), 25) as child:
        assert child.exit_status() == -signal.SIGKILL
    assert num_committed(tmp_path) > 0
    assert list((tmp_path / "spool").iterdir())
    assert ends_as(undisturbed, settings(source, tmp_path, memory={"activations": "host"}))


@pytest.mark.parametrize(
    ("engine", "module", "function"),
    [
        ("threads", "pipeline.planning.probes", "_seconds"),
        ("aio", "pipeline.paging.aio", "_opened_to_write"),
        ("threads", "pipeline.run", "open_job"),
    ],
)
def test_a_run_killed_before_its_ledger_begins_can_be_started_again(
    engine: str, module: str, function: str, source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """While the disk is measured, while the engine is tried out, and with the spool just made."""
    if engine == "aio" and (reason := why_not_aio(tmp_path)):
        pytest.skip(reason)
    begun = settings(source, tmp_path / "run", memory={"activations": "disk", "io": engine})
    with Child(prune_until_call, begun, module, function) as child:
        assert child.exit_status() == -signal.SIGKILL
    assert ends_as(undisturbed, begun)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]


def test_what_killed_workers_have_left_goes_too(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        carry_out(settings(source, tmp_path), stop=lambda: True)
    for name in ("spool-0-0", "spool-1-0", "spool-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruned").write_bytes(b"hidden states")
    carry_out(settings(source, tmp_path, memory={}))
    assert [path.name for path in tmp_path.glob("spool*")] == ["spool-mine"]
