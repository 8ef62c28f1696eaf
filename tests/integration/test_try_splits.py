"""How much goes with whole blocks, found out by throw-away runs: the ordinary path, each once, and what they tell."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pipeline.calibration import load_calibration
from pipeline.config import parse_config
from pipeline.errors import BudgetExceeded, ConfigChanged, ConfigError, RunDirectoryError, RunStopped, VerificationError
from pipeline.progress import Silent
from pipeline.verify import verify
from tests.integration.processes import Child, prune_until_spooled, prune_until_write
from tests.integration.smaller import SLEB, settings
from tests.integration.smaller import six_blocks as six_blocks
from tests.integration.support import (
    SILENT,
    RecipeEntries,
    asked_otherwise,
    carry_out,
    committed,
    load,
    outcome,
    perplexity_of,
    run_command,
)
from tests.tiny import VOCAB

AUTO: RecipeEntries = [{"comp": {"depth_fraction": "auto", "held_out": 0.3}}]
THEN_WANDA: RecipeEntries = [{"comp": {"ratio": 0.4, "depth_fraction": "auto"}}, "wanda"]


class Witness(Silent):
    """Keeps what is said of trials, and of runs that go on."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        if text.startswith("trial ") or "going on" in text:
            self.said.append(text)


def shape_of(directory: Path) -> Any:
    return json.loads((directory / "shape.json").read_text())


@pytest.fixture(scope="module")
def one(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with trials that nothing has disturbed."""
    directory = tmp_path_factory.mktemp("one") / "run"
    carry_out(settings(source, directory, AUTO, 0.4))
    return directory


def test_a_trial_is_a_run_on_some_sequences_judged_on_the_others(source: Path, one: Path, tmp_path: Path) -> None:
    plain = settings(source, tmp_path / "run", [], 0.4)
    tokens = load_calibration(parse_config(plain | {"prune": {}}, "").calibration, source, VOCAB).tokens_NT
    save_file({"tokens": tokens[:4].contiguous()}, tmp_path / "four.safetensors")
    found = shape_of(one)["measured"]
    assert [name for name in found if "go" in name] == ["0 blocks go", "1 blocks go", "2 blocks go"]
    for num_dropped, part in enumerate((0.0, 0.5, 0.9)):
        own = [{"comp": {"depth_fraction": part, "held_out": 0.3}}]
        trial = settings(source, tmp_path / str(num_dropped), own, 0.4)
        trial["calibration"] |= {"source": {"tokens": str(tmp_path / "four.safetensors")}, "sequences": 4}
        carry_out(trial)
        assert len(shape_of(tmp_path / str(num_dropped))["kept"]) == 6 - num_dropped
        after, dense = found[f"{num_dropped} blocks go"]
        assert after == pytest.approx(perplexity_of(load(tmp_path / str(num_dropped) / "model").float(), tokens[4:]))
        assert dense == pytest.approx(perplexity_of(load(source).float(), tokens[4:]))


def test_the_best_split_is_taken_for_a_run_on_all_sequences(source: Path, one: Path, tmp_path: Path) -> None:
    measured = shape_of(one)["measured"]
    best = min(range(3), key=lambda num_dropped: measured[f"{num_dropped} blocks go"][0])
    assert len(shape_of(one)["kept"]) == 6 - best
    part = best / (0.4 * 6) + 1e-9
    carry_out(settings(source, tmp_path, [{"comp": {"depth_fraction": part, "held_out": 0.3}}], 0.4))
    assert outcome(tmp_path)["commits"] == outcome(one)["commits"]
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    verify(one, source, SILENT)


def test_the_report_tells_what_was_tried(one: Path) -> None:
    report, measured = json.loads((one / "report" / "report.json").read_text()), shape_of(one)["measured"]
    told = report["smaller"]["blocks"]["tried"]
    assert told["perplexity"] == {name.split()[0]: figures[0] for name, figures in measured.items() if "go" in name}
    assert (told["sequences"], told["dense"]) == (2, measured["0 blocks go"][1])
    (line,) = (line for line in report["guidance"] if "trial runs" in line)
    figures = ", ".join(f"{measured[f'{number} blocks go'][0]:.2f} without {number}" for number in range(3))
    assert "found by 3 trial runs, whose perplexity on 2 calibration sequences held out from them was, by " in line
    taken = 6 - len(shape_of(one)["kept"])
    assert line.endswith(f"the number of blocks: {figures}; {told['dense']:.2f} before. Taken: without {taken}.")
    assert json.loads((one / "model" / "pruning.json").read_text())["blocks"]["tried"] == told


def test_a_run_killed_again_and_again_repeats_no_trial_and_ends_with_the_same_bytes(
    source: Path, one: Path, tmp_path: Path
) -> None:
    many = settings(source, tmp_path / "many", AUTO, 0.4)
    known: list[str] = []
    for deadly in (8, 90, 150, 60, 150):
        with Child(prune_until_write, many, deadly) as child:
            child.wait_for_report()
            assert child.exit_status() == -signal.SIGKILL
        if (tmp_path / "many" / "shape.json").exists():
            before, known = known, list(shape_of(tmp_path / "many")["measured"])
            assert set(before) <= set(known)
    assert len([name for name in known if "go" in name]) > 1
    witness = Witness()
    carry_out(many, witness)
    trials = [line for line in witness.said if line.startswith("trial ")]
    assert len(trials) == 3 - len([name for name in known if "go" in name])
    assert outcome(tmp_path / "many") == outcome(one)
    assert shape_of(tmp_path / "many") == shape_of(one)
    assert not (tmp_path / "many" / "spool").exists()


def test_a_trial_that_was_stopped_half_way_goes_on_from_there(source: Path, one: Path, tmp_path: Path) -> None:
    own, trial = settings(source, tmp_path, AUTO, 0.4), tmp_path / "spool" / "trials.tmp" / "1"

    def stop() -> bool:
        return (trial / "ledger.jsonl").exists() and committed(trial, 2)()

    with pytest.raises(RunStopped, match=rf"while splits .* were tried; what was found is kept.*run {tmp_path}$"):
        carry_out(own, stop=stop)
    assert list(shape_of(tmp_path)["measured"]) == ["0 blocks go"]
    witness = Witness()
    carry_out(own, witness)
    assert witness.said == [
        "trial 2 of 3: 1 of 6 blocks go",
        "2 of 5 blocks are committed; going on from there",
        "trial 3 of 3: 2 of 6 blocks go",
    ]
    assert outcome(tmp_path) == outcome(one)


@pytest.mark.parametrize("change", [{"sparsity": 0.44}, {"within_block": "sequential"}], ids=str)
def test_trials_with_other_settings_are_not_taken_for_those_that_are_asked_for(
    change: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    own = settings(source, tmp_path, [{"comp": {"depth_fraction": "auto", "heads": 0.5}}], 0.42)
    shape = tmp_path / "shape.json"
    with pytest.raises(RunStopped):
        carry_out(own, stop=lambda: shape.exists() and "0 blocks go" in shape_of(tmp_path)["measured"])
    with pytest.raises(ConfigChanged, match=rf"{'part' if 'sparsity' in change else 'within_block'} .*, now "):
        carry_out(own | {"prune": own["prune"] | change})
    carry_out(own)


def test_what_a_run_with_other_settings_has_left_is_not_gone_on_with(source: Path, one: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    carry_out(settings(source, tmp_path / "other", ["wanda"]))
    shutil.copytree(tmp_path / "other", own / "spool" / "trials.tmp" / "0")
    (own / "lock").write_text("process 1")
    carry_out(settings(source, own, AUTO, 0.4))
    assert outcome(own) == outcome(one)


@pytest.mark.parametrize("spool", ["own", "within"])
def test_ceilings_and_the_spool_change_nothing(spool: str, source: Path, one: Path, tmp_path: Path) -> None:
    place = {"spool": str(tmp_path / "fast")} if spool == "own" else {}
    paged = {"host": "8GiB", "activations": "disk", **place}
    carry_out(settings(source, tmp_path / "paged", AUTO, 0.4, memory=paged))
    assert outcome(tmp_path / "paged") == outcome(one)
    assert [path for path in tmp_path.rglob("*") if "trials" in path.name or "spool" in path.name] == []


def test_a_search_killed_while_its_hidden_states_are_on_disk_goes_on(source: Path, tmp_path: Path) -> None:
    on_disk = {"activations": "disk", "io": "threads"}
    one, many = (settings(source, tmp_path / name, SLEB, 0.4, memory=on_disk) for name in ("one", "many"))
    carry_out(one)
    for deadly in (3, 12):
        with Child(prune_until_spooled, many, deadly) as child:
            child.wait_for_report()
            assert child.exit_status() == -signal.SIGKILL
        assert list((tmp_path / "many" / "spool").iterdir())
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


def test_a_spool_that_no_run_has_left_is_not_emptied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "letters").write_text("dear all")
    with pytest.raises(RunDirectoryError, match=r"existing output directory of another job: .* but spool \(1 in all\)"):
        carry_out(settings(source, tmp_path, AUTO, 0.4))
    assert (tmp_path / "spool" / "letters").read_text() == "dear all"


@pytest.mark.parametrize("others", [{"widths": "per_block"}, {"heads": 0.5}], ids=str)
def test_splits_are_tried_with_all_that_else_makes_blocks_smaller(
    others: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, [{"comp": {"depth_fraction": "auto", **others}}], 0.4))
    tried = [name for name in shape_of(tmp_path)["measured"] if "go" in name]
    assert len(tried) == (2 if "heads" in others else 3)  # with half the heads, two blocks are more than is to go
    verify(tmp_path, source, SILENT)


def test_steps_that_mask_come_after_the_trials_and_not_within_them(source: Path, tmp_path: Path) -> None:
    report = carry_out(settings(source, tmp_path, THEN_WANDA))
    assert len([name for name in shape_of(tmp_path)["measured"] if "go" in name]) == 3
    assert 0.3 < report.achieved < 0.4  # of each row of narrow blocks, rounded down
    verify(tmp_path, source, SILENT)


def test_a_number_of_blocks_that_was_not_to_be_tried_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, [{"comp": {"depth_fraction": 0.9}}], 0.4))

    def change(prune: Any) -> None:
        prune["sparsity"], prune["recipe"][0]["comp"]["depth_fraction"] = 0.2, "auto"

    asked_otherwise(tmp_path, tmp_path / "again", change)
    with pytest.raises(VerificationError, match="2 of 6 blocks are gone, and 0 or 1 were to go"):
        verify(tmp_path / "again", source, SILENT)


@pytest.mark.parametrize(("sequences", "recovery"), [(2, "mask"), (1, "none")])
def test_too_few_sequences_to_hold_some_out_are_refused(
    sequences: int, recovery: str, source: Path, tmp_path: Path
) -> None:
    own = settings(source, tmp_path, [{"comp": {"depth_fraction": "auto", "recovery": recovery}}], 0.4)
    own["calibration"]["sequences"] = sequences
    told = rf"auto tries 3 splits .* is {sequences}: set it to {sequences + 1} at least"
    with pytest.raises(ConfigError, match=told):
        carry_out(own)
    own["calibration"]["sequences"] = sequences + 1
    carry_out(own)


@pytest.mark.parametrize(("sequences", "recovery"), [(3, "mask"), (2, "none")])
def test_a_trial_has_something_to_learn_from_however_much_is_held_out(
    sequences: int, recovery: str, source: Path, tmp_path: Path
) -> None:
    own = settings(source, tmp_path, [{"comp": {"depth_fraction": "auto", "recovery": recovery, "held_out": 0.9}}], 0.4)
    own["calibration"]["sequences"] = sequences
    report = carry_out(own)
    assert report.smaller is not None
    assert json.loads(json.dumps(report.smaller.blocks["tried"]))["sequences"] == 1


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"skip": ["mlp.down_proj"]}, r"prune\.skip leaves mlp\.down_proj dense, but removing neurons"),
        ({"skip": ["nothing"]}, r"prune\.skip: 'nothing' matches no linear"),
        ({"sparsity": "4:8"}, r"mlp\.down_proj has \d+ input features, .*; set `multiple: 8`, or"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused_before_anything_is_tried(
    prune: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    own = settings(source, tmp_path, THEN_WANDA)
    with pytest.raises(ConfigError, match=message):
        carry_out(own | {"prune": own["prune"] | prune})
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_recovery_that_nothing_can_judge_is_refused_before_a_search(source: Path, tmp_path: Path) -> None:
    own = settings(source, tmp_path, [{"comp": {"depth": "greedy", "depth_fraction": 0.9}}], 0.4)
    own["calibration"]["sequences"] = 1
    with pytest.raises(ConfigError, match=r"is none to hold out; set calibration\.sequences to 2 at least"):
        carry_out(own)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_plan_refuses_what_the_run_would(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, config = settings(source, tmp_path / "run", THEN_WANDA), tmp_path / "job.yaml"
    config.write_text(json.dumps(own | {"prune": own["prune"] | {"skip": ["mlp.down_proj"]}}))
    assert run_command(["plan", config], monkeypatch) == 1
    assert "prune.skip leaves mlp.down_proj dense" in " ".join(capsys.readouterr().err.split())


def test_a_trial_that_does_not_fit_is_refused_as_a_run_is(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match=r"above memory\.host"):
        carry_out(settings(source, tmp_path, AUTO, 0.4, memory={"host": "20MiB"}))


def test_the_command_says_what_was_tried(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(settings(source, tmp_path / "run", AUTO, 0.4)))
    assert run_command(["plan", config], monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "3 splits between whole blocks and neurons, by a run each (trials)" in said
    assert run_command(["run", config], monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "trial 3 of 3: 2 of 6 blocks go" in said
    assert "How much goes with whole blocks was found by 3 trial runs" in said
