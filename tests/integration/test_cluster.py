"""Over a real Ray: the bytes of one process, however blocks and sequences are spread; stages that work at once."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigChanged, ConfigError, RunStopped
from pipeline.ledger import LEDGER_NAME, Ledger
from pipeline.verify import verify
from tests.bench.handoffs import run_in_stages
from tests.integration.clusters import (
    BESA_DENSE,
    Listener,
    alone,
    carry_out_there,
    facts_of,
    header_of,
    is_verified,
    pruned_alike,
    six_blocks,
    spans_of,
    spread,
)
from tests.integration.clusters import warm_ray as warm_ray
from tests.integration.support import SILENT, RecipeEntries, carry_out, committed, outcome

pytestmark = pytest.mark.usefixtures("warm_ray")

WANDA: RecipeEntries = ["wanda"]
BOTH: RecipeEntries = ["besa", "sparsegpt"]
TUNED: RecipeEntries = ["wanda", {"reconstruct": {"epochs": 1, "norms": True}}]
NARROW: RecipeEntries = [
    {"comp": {"ratio": 0.3, "depth_fraction": 0.6, "multiple": 8, "widths": "per_block", "spread": 0.6}},
    "wanda",
]
FEWER_HEADS: RecipeEntries = [{"comp": {"ratio": 0.4, "heads": 0.5, "multiple": 8}}, "wanda"]
BIASED: RecipeEntries = [{"flap": {"ratio": 0.3, "multiple": 8}}, "wanda"]
TRIED: RecipeEntries = [{"comp": {"ratio": 0.4, "depth_fraction": "auto", "multiple": 8}}, "wanda"]
SILENT_SOME: RecipeEntries = [{"two_ssp": {"ratio": 0.4, "multiple": 8}}, "wanda"]
REBUILT: RecipeEntries = [BESA_DENSE, "sparsegpt"]
"""Both streams must be made again after a stop, and kept weights are new ones, rounded to what is stored."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def in_one_process(source: Path) -> Callable[[RecipeEntries], Path]:
    """The run directory of a job that this process did alone, by recipe."""

    def run_directory(recipe: RecipeEntries) -> Path:
        output = source.parent / f"alone {recipe}"
        if not output.exists():
            carry_out(alone(source, output, recipe))
        return output

    return run_directory


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_wanda_prunes_as_one_process_does(
    stages: int, replicas: int, source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    carry_out_there(spread(alone(source, tmp_path), stages=stages, replicas=replicas))
    assert pruned_alike(tmp_path) == pruned_alike(in_one_process(WANDA))
    assert header_of(tmp_path).get("replicas", 1) == replicas


@pytest.mark.parametrize(
    "recipe",
    [["sparsegpt"], ["besa"], [BESA_DENSE], BOTH, TUNED, NARROW, FEWER_HEADS, BIASED, TRIED, SILENT_SOME],
    ids=str,
)
def test_three_stages_make_what_one_process_makes(
    recipe: RecipeEntries, source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    carry_out_there(spread(alone(source, tmp_path, recipe), stages=3))
    assert outcome(tmp_path) == outcome(in_one_process(recipe))


def test_what_a_survey_here_allocates_to_each_block_the_workers_go_by(source: Path, tmp_path: Path) -> None:
    allocation = {"owl": {"spread": 0.2, "threshold": 2}}
    settings = [alone(source, tmp_path / name) for name in ("here", "there")]
    for plain in settings:
        plain["prune"]["allocation"] = allocation
    carry_out(settings[0])
    carry_out_there(spread(settings[1], stages=3))
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    commits = Ledger.read(tmp_path / "there").commits
    assert len({record.sparsity for commit in commits.values() for record in commit.linears.values()}) == len(commits)


@pytest.mark.parametrize(
    ("recipe", "handoff"), [(["sleb"], "pruned"), ([{"shortgpt": {"ratio": 0.34}}, BESA_DENSE], "pruned"),
                            ([{"shortgpt": {"ratio": 0.34}}, "wanda"], "dense")], ids=str
)  # fmt: skip
def test_workers_go_by_the_blocks_that_are_left(
    recipe: RecipeEntries, handoff: str, source: Path, tmp_path: Path
) -> None:
    settings = [alone(source, tmp_path / name, recipe) for name in ("here", "there")]
    carry_out_there(spread(settings[1], stages=2, handoff=handoff))
    if handoff == "pruned":
        carry_out(settings[0])
        assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    assert len(Ledger.read(tmp_path / "there").commits) == len(header_of(tmp_path / "there")["shape"]["kept"]) < 6
    found = verify(tmp_path / "there", source, SILENT)
    assert found.parameters < found.source_parameters


def test_the_coordinator_has_the_model_write_its_calibration_text_for_all_workers(source: Path, tmp_path: Path) -> None:
    settings = {name: alone(source, tmp_path / name, WANDA) for name in ("here", "there")}
    for own in settings.values():
        own["calibration"] |= {"source": "self"}
    carry_out(settings["here"])
    carry_out_there(spread(settings["there"], stages=2, replicas=2))
    assert pruned_alike(tmp_path / "there") == pruned_alike(tmp_path / "here")
    calibrations = {Ledger.read(tmp_path / name).header.calibration for name in settings}
    assert len(calibrations) == 1


def test_magnitude_does_not_ask_how_the_sequences_are_spread(
    source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    carry_out_there(spread(alone(source, tmp_path, ["magnitude"]), stages=1, replicas=2))
    assert pruned_alike(tmp_path) == pruned_alike(in_one_process(["magnitude"]))


@pytest.mark.parametrize("recipe", [BOTH, TUNED, NARROW, FEWER_HEADS, BIASED, SILENT_SOME], ids=str)
def test_gram_matrices_and_gradients_of_two_replicas_sum_to_the_same_bytes_in_every_run(
    recipe: RecipeEntries, source: Path, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        carry_out_there(spread(alone(source, tmp_path / name, recipe), stages=1, replicas=2))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")
    assert header_of(tmp_path / "one")["replicas"] == 2
    assert is_verified(tmp_path / "one", source)


@pytest.mark.parametrize("recipe", [["wanda"], ["besa"], [BESA_DENSE]], ids=str)
def test_the_dense_handoff_makes_what_stages_in_turn_make(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    carry_out_there(spread(alone(source, tmp_path / "there", recipe), stages=3, handoff="dense"))
    run_in_stages(parse_config(alone(source, tmp_path / "in turn", recipe), "the test"), 3)
    assert outcome(tmp_path / "there") == outcome(tmp_path / "in turn")
    assert header_of(tmp_path / "there")["dense_handoff_at"] == [2, 4]
    assert is_verified(tmp_path / "there", source)


def test_a_run_with_one_handoff_is_not_gone_on_with_the_other(
    source: Path, in_one_process: Callable[[RecipeEntries], Path]
) -> None:
    begun = alone(source, in_one_process(WANDA))
    with pytest.raises(ConfigChanged, match=r'dense_handoff_at: "\(absent\)" in the ledger, \[2,4\] asked for'):
        carry_out_there(spread(begun, stages=3, handoff="dense"))


def test_a_run_with_one_number_of_replicas_is_not_gone_on_with_another(
    source: Path, in_one_process: Callable[[RecipeEntries], Path]
) -> None:
    begun = alone(source, in_one_process(WANDA))
    with pytest.raises(ConfigChanged, match=r'replicas: "\(absent\)" in the ledger, 2 asked for'):
        carry_out_there(spread(begun, stages=1, replicas=2))


def test_what_one_process_has_begun_a_cluster_finishes(
    source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    begun = alone(source, tmp_path, REBUILT)
    with pytest.raises(RunStopped, match="3 of 6 blocks are committed"):
        carry_out(begun, stop=committed(tmp_path, 3))
    carry_out_there(spread(begun, stages=3))
    assert outcome(tmp_path) == outcome(in_one_process(REBUILT))


def test_what_a_cluster_was_stopped_at_either_finishes(
    source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    here, there = alone(source, tmp_path / "here", REBUILT), alone(source, tmp_path / "there", REBUILT)
    way_on = f"blocks are committed in {tmp_path / 'here'}. Go on with: secateur run {tmp_path / 'here'}"
    with pytest.raises(RunStopped, match=re.escape(way_on)):
        carry_out_there(spread(here, stages=3), stop=committed(tmp_path / "here", 2))
    assert 2 <= len(Ledger.read(tmp_path / "here").commits) <= 3
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    carry_out(here)
    carry_out_there(spread(there, stages=2))
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there") == outcome(in_one_process(REBUILT))


def test_a_trial_of_a_shape_that_was_cut_short_goes_on_in_a_cluster(
    source: Path, in_one_process: Callable[[RecipeEntries], Path], tmp_path: Path
) -> None:
    begun, trial, listener = alone(source, tmp_path, TRIED), tmp_path / "spool" / "trials.tmp" / "1", Listener()
    with pytest.raises(RunStopped, match="while splits between blocks and neurons were tried"):
        carry_out(begun, stop=lambda: (trial / LEDGER_NAME).exists() and committed(trial, 2)())
    carry_out_there(spread(begun, stages=3), listener)
    assert "2 of 5 blocks are committed; going on from there" in listener.said
    assert outcome(tmp_path) == outcome(in_one_process(TRIED))
    assert not (tmp_path / "spool").exists()


def test_a_stage_collects_while_the_one_before_it_propagates(source: Path, tmp_path: Path) -> None:
    settings = alone(source, tmp_path)
    settings["calibration"]["sequences"] = 64  # batches enough to see both at work
    carry_out_there(spread(settings, stages=3))
    handing_on, spans = facts_of(tmp_path)["overlaps"]["handing_on"], spans_of(tmp_path)
    for stage in (0, 1):
        assert handing_on[str(stage)] > 0
        began, ended = spans[stage, f"propagate {2 * stage + 1}"]
        assert began < spans[stage + 1, f"collect {2 * stage + 2}"][0] < ended


def test_with_the_dense_handoff_all_stages_prune_at_once(source: Path, tmp_path: Path) -> None:
    # So many epochs that no stage is done before the last one's worker has come up.
    carry_out_there(spread(alone(source, tmp_path, [{"besa": {"epochs": 25}}]), stages=3, handoff="dense"))
    assert facts_of(tmp_path)["overlaps"]["at_once"]["3"] > 0
    spans = spans_of(tmp_path)
    all_have_begun = max(spans[stage, f"collect {2 * stage}"][0] for stage in range(3))
    assert all_have_begun < min(spans[stage, f"commit {2 * stage + 1}"][1] for stage in range(3))


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"stages": 7}, r"cluster\.stages: 7 stages for 6 blocks; .*: ask for 1 to 6"),
        ({"stages": 1, "replicas": 7}, r"cluster\.replicas: 7 replicas for 6 batches \(6 sequences, 1 in each\); .*"),
        ({"cpus": 9}, r"no node of the cluster has room for a worker of 9 CPU \(.*: 8 CPU\); lower cluster\.cpus"),
        ({"gpus": 1}, r"no node .* of 1 CPU, 1 GPU \(.*: 8 CPU\); lower cluster\.cpus or cluster\.gpus"),
    ],
)
def test_what_cannot_be_is_refused_before_a_job_is_begun(
    cluster: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        carry_out_there(spread(alone(source, tmp_path), **cluster))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
