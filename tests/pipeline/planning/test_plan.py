"""A plan of a real checkpoint: its sizes, its totals, its ceilings, and that it holds what a run then takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig, parse_config
from pipeline.errors import BudgetExceeded, ConfigError
from pipeline.planning.fitting import DEEP
from pipeline.planning.footprint import Choice
from pipeline.planning.plan import Plan, existing, fit_for, make_plan, measure_speeds
from pipeline.skeleton import Skeleton
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan") / "model"
    save_tiny("llama", directory)
    return directory


def config_of(model: Path, **sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "model": str(model), "output": str(model.parent / "run"),
        "calibration": {"sequences": 6, "tokens": 24}, "prune": {"recipe": ["wanda"]}, "compute": {"device": "cpu"},
    }  # fmt: skip
    return parse_config(raw | sections, "the test")


def planned(model: Path, baseline: int | None = 10**6, **sections: Any) -> Plan:
    return make_plan(config_of(model, **sections), model, None, baseline)


def test_a_plan_tells_the_model_and_what_its_phases_add_up_to(model: Path) -> None:
    plan = planned(model, evaluate={"windows": 3, "sequence_length": 20})
    assert (plan.model_type, plan.num_blocks, plan.block_weights) == ("llama", 3, 7680)
    assert (plan.device, plan.dtype) == ("cpu", "float32")
    names = ["embed", "read", "collect", "prune", "commit", "propagate", "evaluate", "assemble"]
    assert [phase.name for phase in plan.phases] == names
    assert plan.host_bytes == max(phase.host_bytes for phase in plan.phases) > 10**6
    for phase in plan.phases[:-1]:
        assert phase.host_bytes == sum(phase.held.values())
    for total in ("bytes_read", "bytes_written", "flops"):
        assert getattr(plan, total) == sum(getattr(phase, total) for phase in plan.phases)
    assert (plan.device_bytes, plan.seconds, plan.bottleneck, plan.refused) == (0, None, None, ())


def test_every_weight_is_written_once(model: Path) -> None:
    plan, total = planned(model), Checkpoint.open(model).total_bytes()
    norms = 3 * 2 * 32 * 4  # of the blocks: too small to be counted with them
    assert plan.output_bytes == total
    assert plan.bytes_written == total - norms


def test_a_run_on_disk_keeps_its_hidden_states_in_the_spool(model: Path) -> None:
    plan = planned(model, memory={"activations": "disk"})
    assert plan.choice == Choice(tier="disk", fused=True, ahead=2, depth=DEEP)
    assert plan.spool_bytes == 6 * 4096  # 3072 bytes a sequence, padded
    assert plan.bytes_read > planned(model).bytes_read


def test_ceilings_are_held_or_the_run_is_refused(model: Path) -> None:
    needed = planned(model).host_bytes
    assert planned(model, memory={"host": needed + 2**20}).refused == ()
    refused = planned(model, memory={"host": 10**6}).refused
    assert len(refused) == 1
    assert "above memory.host: 1 MB" in refused[0]
    on_disk = planned(model, memory={"activations": "disk", "spool_limit": 4096})
    assert "calibration.sequences: 1" in on_disk.refused[0]


def test_on_a_cpu_a_ceiling_of_the_device_is_one_of_the_host(model: Path) -> None:
    (told,) = planned(model, memory={"device": 10**6, "host": 10**9}).refused
    assert "above memory.device: 1 MB" in told
    assert planned(model, memory={"device": 10**9, "host": 10**6}).limits["host"] == 10**6


def test_without_a_baseline_the_present_process_is_counted(model: Path) -> None:
    assert planned(model, baseline=None).host_bytes > 100 * 10**6


def test_a_worker_chooses_for_its_own_part_of_the_sequences(model: Path) -> None:
    config = config_of(model, memory={"activations": "disk", "spool_limit": 3 * 4096})
    skeleton = Skeleton(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    assert fit_for(config, skeleton, 3, 0).choice.tier == "disk"
    with pytest.raises(BudgetExceeded, match=r"above memory\.spool_limit: 12\.3 kB"):
        fit_for(config, skeleton, 6, 0)


def test_a_survey_is_planned_for_who_makes_it(model: Path) -> None:
    owl = {"prune": {"recipe": ["wanda"], "allocation": "owl"}}
    plan = planned(model, **owl)
    assert "survey" in [phase.name for phase in plan.phases]
    assert plan.forward_passes == planned(model).forward_passes + 1
    skeleton = Skeleton(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    assert "survey" in fit_for(config_of(model, **owl), skeleton, 6, 0, surveys=True).working_sets
    assert "survey" not in fit_for(config_of(model, **owl), skeleton, 6, 0).working_sets


def test_a_plan_is_plain_data_for_json(model: Path) -> None:
    plain = json.loads(json.dumps(planned(model).as_json()))
    assert plain["choice"] == {"tier": "host", "fused": False, "ahead": 0, "depth": 2}
    assert plain["phases"][3]["name"] == "prune"
    assert plain["phases"][3]["held"]["interpreter and libraries"] == 10**6


def test_forward_passes_count_backward_ones_twice(model: Path) -> None:
    wanda = planned(model).forward_passes  # collecting ends at the input of the last linear
    assert 1.5 < wanda < 2
    assert planned(model, prune={"recipe": ["magnitude"]}).forward_passes == pytest.approx(1 + 1 / 6)
    besa = planned(model, prune={"recipe": [{"besa": {"epochs": 2, "target": "dense"}}]}).forward_passes
    assert besa == pytest.approx(wanda + 1 + 3 * 2)
    again = planned(model, prune={"recipe": ["wanda"], "within_block": "sequential"}).forward_passes
    assert wanda < again < wanda + 3


def test_measured_speeds_give_a_plan_its_time_and_bottleneck(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.pace.PROBED_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.planning.pace.HASHED_BYTES", 1 << 20)
    config = config_of(model, memory={"io": "threads"})
    plan = make_plan(config, model, measure_speeds(config, model), 0)
    assert plan.seconds == pytest.approx(sum(phase.seconds or 0 for phase in plan.phases))
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.bottleneck in ("disk", "computing")
    assert not config.output.exists()


def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="'warp' cannot be used here"):
        planned(model, compute={"device": "warp"})


def test_the_nearest_existing_directory_stands_for_one_that_is_to_be_made(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
