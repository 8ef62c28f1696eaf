"""Time of phases: counts divided by speeds, the slowest of disk, copying and computing, and what overlaps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import StorageError
from pipeline.methods.besa import Besa
from pipeline.methods.wanda import Wanda
from pipeline.paging.pager import ThreadPager
from pipeline.planning.footprint import Choice
from pipeline.planning.pace import Cost, Speeds, costs, probe_speeds
from pipeline.planning.scale import Scale
from tests.scales import LLAMA_70B, scale_70b

INSTANT = Speeds(
    disk_read=math.inf, disk_write=math.inf, copy=math.inf, gemm=math.inf, gram=math.inf, factor=math.inf,
    double=math.inf, double_factor=math.inf, memory=math.inf, hash=math.inf, seconds_per_column=0.0,
)  # fmt: skip
BLOCK = 2 * LLAMA_70B.num_weights
BOUNDARY = LLAMA_70B.boundary_bytes
IN_MEMORY = Choice(tier="pinned", fused=False, ahead=0)
ON_DISK = Choice(tier="disk", fused=False, ahead=0)


def by_name(scale: Scale, choice: Choice, speeds: Speeds | None) -> dict[str, Cost]:
    return {cost.name: cost for cost in costs(scale, choice, speeds, outside_bytes=10**9)}


def test_a_phase_takes_as_long_as_the_slowest_of_what_goes_on_at_the_same_time() -> None:
    speeds = replace(INSTANT, gemm=457e12, disk_read=1e9, disk_write=1e9, copy=10e9)
    found = by_name(scale_70b(Wanda()), ON_DISK, speeds)
    assert found["propagate"].seconds == pytest.approx(79 * 2 * BOUNDARY / 1e9)
    assert found["propagate"].bottleneck == "disk"
    assert found["collect"].seconds == pytest.approx(80 * BOUNDARY / 1e9)
    in_memory = by_name(scale_70b(Wanda()), IN_MEMORY, replace(speeds, copy=1e9))
    assert in_memory["propagate"].bottleneck == "copying"
    computed = by_name(scale_70b(Wanda()), IN_MEMORY, replace(speeds, copy=math.inf))
    assert computed["propagate"].seconds == pytest.approx(79, rel=0.01)
    assert computed["propagate"].bottleneck == "computing"


def test_a_shard_is_hashed_and_written_in_turn() -> None:
    found = by_name(scale_70b(Wanda()), IN_MEMORY, replace(INSTANT, disk_write=1e9, hash=1e9))
    assert found["commit"].seconds == pytest.approx(80 * 2 * BLOCK / 1e9)


def test_reading_ahead_hides_the_reading_of_weights_behind_everything_else() -> None:
    slow_disk, slow_besa = replace(INSTANT, disk_read=1e9), replace(INSTANT, disk_read=1e9, gemm=457e12)
    ahead = replace(IN_MEMORY, ahead=1)
    assert by_name(scale_70b(Besa()), ahead, slow_disk)["read"].seconds == pytest.approx(80 * BLOCK / 1e9)
    assert by_name(scale_70b(Besa()), IN_MEMORY, slow_besa)["read"].seconds == pytest.approx(80 * BLOCK / 1e9)
    assert by_name(scale_70b(Besa()), ahead, slow_besa)["read"].seconds == 0


def test_fused_a_boundary_is_read_and_written_once_a_block() -> None:
    apart, fused = (by_name(scale_70b(Wanda()), replace(ON_DISK, fused=f), None) for f in (False, True))
    assert apart["collect"].disk_read == 80 * BOUNDARY
    assert apart["propagate"].disk_read == apart["propagate"].disk_written == 79 * BOUNDARY
    assert "propagate" not in fused
    assert fused["collect"].disk_read == BOUNDARY
    assert fused["fused"].disk_read == fused["fused"].disk_written == 79 * BOUNDARY
    total = {name: sum(cost.flops for cost in found.values()) for name, found in (("apart", apart), ("fused", fused))}
    assert total["apart"] == pytest.approx(total["fused"])


def test_a_survey_is_a_pass_over_the_model_and_a_second_embedding() -> None:
    without, surveyed = scale_70b(Wanda()), replace(scale_70b(Wanda()), surveys=True)
    plain, found = (by_name(scale, ON_DISK, None) for scale in (without, surveyed))
    assert list(found)[:3] == ["embed", "survey", "read"]
    assert found["embed"].disk_written == 2 * plain["embed"].disk_written
    assert found["survey"].disk_read == 80 * (BLOCK + BOUNDARY)
    assert found["survey"].disk_written == 80 * BOUNDARY
    assert found["survey"].flops == 80 * LLAMA_70B.forward_flops
    assert all(found[name] == plain[name] for name in plain if name != "embed")


def test_without_speeds_bytes_and_operations_are_counted_and_no_time_is_told() -> None:
    found = by_name(scale_70b(Wanda()), ON_DISK, None)
    assert {(cost.seconds, cost.bottleneck) for cost in found.values()} == {(None, None)}
    assert found["read"].disk_read == found["commit"].disk_written == 80 * BLOCK
    assert (found["assemble"].disk_read, found["assemble"].disk_written) == (10**9, 10**9)


def test_on_a_cpu_nothing_is_copied_to_a_device_and_memory_is_no_disk() -> None:
    found = by_name(scale_70b(Wanda(), unified=True), Choice(tier="host", fused=False, ahead=0), None)
    assert {cost.copied for cost in found.values()} == {0}
    assert found["collect"].disk_read == found["propagate"].disk_written == 0


def test_an_evaluation_runs_twice_through_all_blocks_and_the_head() -> None:
    found = by_name(replace(scale_70b(Wanda()), windows=(128, 2048)), IN_MEMORY, None)["evaluate"]
    head = 2.0 * LLAMA_70B.all_tokens * 8192 * 32000
    assert found.flops == pytest.approx(2 * (80 * LLAMA_70B.forward_flops + head))
    assert found.disk_read == 2 * 80 * BLOCK


def test_this_machine_has_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.pace.PROBED_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.planning.pace.HASHED_BYTES", 1 << 20)
    pager = ThreadPager()
    speeds = probe_speeds(tmp_path, pager, torch.device("cpu"), torch.float32)
    assert speeds.gemm == speeds.gram
    for rate in (speeds.disk_read, speeds.disk_write, speeds.copy, speeds.gemm, speeds.memory, speeds.hash):
        assert 1e5 < rate < 1e16
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"cannot be measured: No such file or directory; set memory\.spool"):
        probe_speeds(tmp_path / "gone", pager, torch.device("cpu"), torch.float32)
    pager.close()
