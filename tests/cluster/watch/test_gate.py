"""The gate: every check of a finished run, and all that failed named at once."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.watch.gate import in_own_process, pass_gate
from cluster.watch.gate_config import GateConfig
from pipeline.config import RunConfig, parse_config
from pipeline.errors import GateFailed, VerificationError
from tests.cluster.watch.watching import dies_with_its_watcher
from tests.integration.support import carry_out, job


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = job(tiny, tmp_path_factory.mktemp("gate") / "run", recipe=["magnitude"])
    carry_out(settings)
    return settings


@pytest.fixture
def run(finished: dict[str, Any], tmp_path: Path) -> RunConfig:
    """A finished run, which may be damaged."""
    shutil.copytree(finished["output"], tmp_path / "run")
    return parse_config({**finished, "output": str(tmp_path / "run")}, "the test")


def report(run: RunConfig, **changes: Any) -> None:
    path = run.output / "report" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def gate(**sections: Any) -> GateConfig:
    return GateConfig.model_validate(sections)


def test_a_good_run_passes_with_its_figures(run: RunConfig) -> None:
    results = pass_gate(gate(perplexity_ratio=3, max_perplexity=1000), run)
    assert [check["name"] for check in results["checks"]] == ["sparsity", "perplexity ratio", "perplexity", "verify"]
    assert all(check["ok"] for check in results["checks"])
    assert results["checks"][0]["value"] == "50.0000%"
    assert results["report"]["pruned_weights"] == 11_520
    assert json.loads(json.dumps(results)) == results


def test_all_checks_that_fail_are_named_with_figures(run: RunConfig) -> None:
    report(run, perplexity_before=10.0, perplexity_after=25.0, achieved_sparsity=0.45)
    with pytest.raises(GateFailed) as failed:
        pass_gate(gate(perplexity_ratio=2, max_perplexity=20), run)
    assert failed.value.message == (
        "the pruned model failed 3 of 4 checks: sparsity is 45.0000%, asked was 50.0000% within 0.5000%; "
        "perplexity ratio is 2.5000, asked was at most 2; perplexity is 25.0000, asked was at most 20"
    )


def test_a_model_without_some_blocks_is_held_against_whole_blocks(tiny: Path, tmp_path: Path) -> None:
    settings = job(tiny, tmp_path / "run", recipe=["shortgpt"], sparsity=0.4)
    carry_out(settings)
    own = parse_config(settings, "the test")
    results = pass_gate(gate(), own)
    assert [check["name"] for check in results["checks"]] == ["blocks", "verify"]
    assert results["checks"][0]["value"] == "1 of 3 gone"
    smaller = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["smaller"]
    for num_blocks in (1, 3):
        report(own, smaller={**smaller, "num_blocks": num_blocks})
        with pytest.raises(GateFailed, match=rf"blocks is {3 - num_blocks} of 3 gone, asked was 40\.0000% of them"):
            pass_gate(gate(verify=False), own)


@pytest.mark.parametrize("widths", ["uniform", "per_block"])
def test_blocks_may_stay_where_neurons_go(widths: str, tiny: Path, tmp_path: Path) -> None:
    settings = job(tiny, tmp_path / "run", recipe=[{"comp": {"depth_fraction": 0, "widths": widths}}], sparsity=0.4)
    carry_out(settings)
    own = parse_config(settings, "the test")
    checks = pass_gate(gate(), own)["checks"]
    assert [check["name"] for check in checks] == ["blocks", "verify"]
    assert (checks[0]["value"], checks[0]["limit"]) == ("0 of 3 gone", "40.0000% of them, with neurons of the others")
    smaller = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["smaller"]
    report(own, smaller={**smaller, "num_blocks": 1})
    with pytest.raises(GateFailed, match=r"blocks is 2 of 3 gone, asked was 40\.0000% of them, with neurons"):
        pass_gate(gate(verify=False), own)


def test_blocks_may_stay_where_attentions_are_silenced_and_no_neurons_go(tiny: Path, tmp_path: Path) -> None:
    settings = job(tiny, tmp_path / "run", recipe=[{"two_ssp": {"alpha": 100.0}}], sparsity=0.35)
    carry_out(settings)
    (blocks, _) = pass_gate(gate(), parse_config(settings, "the test"))["checks"]
    assert (blocks["value"], blocks["limit"]) == ("0 of 3 gone", "35.0000% of them, with attentions of the others")


def test_whole_blocks_are_counted_in_whole_numbers(run: RunConfig) -> None:
    smaller = {"asked": 0.58, "num_blocks": 21, "blocks": {"of": 50}}  # 0.58 * 50 is 28.999999999999996
    report(run, smaller=smaller)
    checks = pass_gate(gate(verify=False), run)["checks"]
    assert (checks[0]["name"], checks[0]["ok"]) == ("blocks", True)


def test_a_limit_that_is_just_met_is_met(run: RunConfig) -> None:
    report(run, perplexity_before=10.0, perplexity_after=20.0)
    pass_gate(gate(perplexity_ratio=2, max_perplexity=20), run)


def test_rows_that_round_down_do_not_fail_a_gate_that_says_nothing_of_it(run: RunConfig) -> None:
    report(run, achieved_sparsity=0.4985)  # 30% of 576 columns, which SmolLM2-135M has, is 29.86%
    pass_gate(gate(verify=False), run)


def interrupt_oneself() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return "at work"


def test_what_is_measured_in_a_process_of_its_own_leaves_signals_to_the_watcher() -> None:
    assert in_own_process(interrupt_oneself) == "at work"


def measure_for_ever(started: Path) -> None:
    started.write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def test_a_watcher_that_is_killed_takes_what_it_measures_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    context = multiprocessing.get_context("spawn")
    watcher = context.Process(target=in_own_process, args=(measure_for_ever, started))
    assert dies_with_its_watcher(watcher, started)


def test_a_byte_that_was_changed_is_found_unless_nobody_looks(run: RunConfig) -> None:
    shard = sorted((run.output / "model").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match="is not what its ledger says"):
        pass_gate(gate(), run)
    pass_gate(gate(verify=False), run)
