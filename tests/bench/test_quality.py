"""The quality bench: what it would run, what it remembers, what it shows. No figure of a real model is made here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.calibration import CalibrationConfig, load_calibration
from pipeline.config import validated
from pipeline.errors import CalibrationError, ConfigError
from tests.bench.quality.__main__ import work_through
from tests.bench.quality.plan import BENCH, SMALLER, Bench, Run, load_bench
from tests.bench.quality.results import Figures, Result, Results, code_digest
from tests.bench.quality.runs import Workshop, open_workshop, require_achieved
from tests.bench.quality.smaller import smaller_section
from tests.bench.quality.tables import Board, board_of, marks_of, rewrite, section, sparsity_table
from tests.bench.quality.weighing import Weight
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
WANDA = Run(recipe="wanda", sparsity=0.5, size="16x256", seed=0)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return load_bench()


def result(bench: Bench, run: Run | None, perplexity: float = 50.0, **changed: Any) -> Result:
    """A result as a run of the bench would leave it, with made-up figures."""
    figures = Figures(
        perplexity=dict.fromkeys(bench.evaluate, perplexity), seconds=14.0, passes=2.3, peak=210_000_000, wall=20.0
    )
    facts: dict[str, Any] = {"model": "m", "evaluate": {}, "compute": {"threads": 2}, "versions": {"torch": "2.13"}}
    facts |= {} if run is None else {"prune": bench.prune_of(run)}
    made = Result(run=run, facts=facts, code="c", figures=figures, commit="abc", day="2026-11-22")
    return replace(made, **changed)


def whole_board(bench: Bench) -> Board:
    """Every run of the bench has a result: the more sparse, and the later its seed, the worse."""
    made = [result(bench, run, 40.0 + 10 * run.seed) for run in bench.runs()]
    return board_of(bench, [result(bench, None, 27.43), *made], "m")


def test_the_bench_begins_with_every_first_recipe_at_half_the_weights(bench: Bench) -> None:
    runs = bench.runs()
    wanted = {n for n, r in bench.recipes.items() if r.priority == 1 and (r.sparsities is None or 0.5 in r.sparsities)}
    first = {run.recipe for run in runs[: len(wanted)]}
    assert first == wanted
    assert {(run.sparsity, run.seed, run.size) for run in runs[: len(first)]} == {(0.5, 0, bench.sizes[0])}
    assert len(set(runs)) == len(runs) >= 50


def test_runs_are_chosen_by_what_they_are_called_and_by_seed(bench: Bench) -> None:
    chosen = bench.runs("wanda 50%", num_seeds=2)
    assert [str(run) for run in chosen if run.size == "16x256"] == [
        "wanda 50% 16x256 seed 0",
        "wanda 50% 16x256 seed 1",
    ]


def test_half_of_the_gap_to_the_dense_model_is_the_mark(bench: Bench) -> None:
    marks = {sparsity: bench.references.mark(sparsity) for sparsity in (0.5, "2:4", 0.7, 0.6)}
    assert marks == {0.5: pytest.approx(36.8, abs=0.05), "2:4": pytest.approx(51.5, abs=0.05),
                     0.7: pytest.approx(95, abs=0.2), 0.6: None}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"recipes": {"two": {"prune": {"recipe": ["sparsegpt", "wanda"]}}}},
            "recipes.two at 50%: .*wanda chooses a mask",
        ),
        ({"recipes": {"wand": {"prune": {"recipe": ["wand"]}}}}, "no method is called 'wand'; did you mean 'wanda'"),
        ({"sizes": ["16x256"]}, r"rounds ask for the sizes \['64x512'\]; the bench's are 16x256"),
        (
            {"recipes": {"one": {"prune": {"recipe": ["wanda"]}}}},
            r"the recipes \['admm', 'alps', 'besa', .*\]; the bench's are one",
        ),
        ({"sizes": ["16 x 256"]}, "sizes.0: "),
    ],
)
def test_a_bench_that_cannot_be_run_is_refused_at_once(bench: Bench, changed: dict[str, Any], said: str) -> None:
    raw = {**bench.model_dump(exclude_none=True), **changed}
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        validated(Bench, raw, str(BENCH))


def test_results_are_found_again_by_all_that_decides_them(bench: Bench, tmp_path: Path) -> None:
    made = result(bench, WANDA)
    Results(tmp_path / "results.jsonl").add(made)
    again = Results(tmp_path / "results.jsonl")
    assert again.find(WANDA, made.facts, "c") == made
    assert again.find(replace(WANDA, seed=1), made.facts, "c") is None
    assert again.find(WANDA, {**made.facts, "compute": {"threads": 1}}, "c") is None
    assert again.find(WANDA, made.facts, "other code") is None
    assert again.find(WANDA, made.facts, None) == made


def test_a_line_that_was_not_written_to_its_end_is_forgotten(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add(result(bench, None))
    path.write_bytes(path.read_bytes() + b'{"run": {"recipe": "wa')
    cut = Results(path)
    assert [r.run for r in cut.all] == [None]
    cut.add(result(bench, WANDA))
    assert [r.run for r in Results(path).all] == [None, WANDA]


def test_a_run_is_expected_to_take_what_runs_like_it_took(bench: Bench, tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    assert results.expected(WANDA) is None
    results.add(result(bench, WANDA))
    assert results.expected(replace(WANDA, seed=2)) == 20.0
    assert results.expected(replace(WANDA, recipe="besa")) == 20.0
    assert results.expected(replace(WANDA, size="64x512")) == 160.0


def test_only_what_runs_makes_the_code_another(tmp_path: Path) -> None:
    digests = []
    for code in ("x = 1\n", '"""Say it."""\nx = 1  # why\n', "x = 2\n"):
        (tmp_path / "m.py").write_text(code)
        digests.append(code_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]


def test_every_recipe_stands_in_the_tables_beside_its_reference(bench: Bench) -> None:
    text = section(whole_board(bench))
    lines = text.splitlines()
    for name in (*bench.recipes, *bench.references.recipes):
        assert any(line.startswith(f"| {name} |") for line in lines), name
    for figure in (f"{value:.2f}" for by in bench.references.recipes.values() for value in by.values()):
        assert f"| {figure} |" in text, figure
    assert (
        "| wanda | **40.00** | 51.94 | 50.00 (40.00 to 60.00) | 50.00 (40.00 to 60.00) | 14 s | 2.3 | 0.21 GB |"
        in lines
    )
    assert (
        "**50%**: the best of the authors' code leaves 46.21; half of its gap to the dense model would be 36.8" in text
    )
    assert "reached by none." in text
    assert "| wanda | 50% | 40.00 | 40.00 | 40.00 | 40.00 | 14 s | 14 s |" in lines
    assert "Dense: 27.43 on WikiText-2" in text


def test_a_recipe_below_the_mark_is_said_to_reach_it(bench: Bench) -> None:
    board = board_of(bench, [result(bench, WANDA, 36.0), result(bench, replace(WANDA, recipe="sparsegpt"), 40.0)], "m")
    assert "would be 36.8, reached by wanda." in sparsity_table(board, 0.5)


def test_what_is_no_longer_so_is_not_shown(bench: Bench) -> None:
    late = result(bench, WANDA, 41.0)
    others = [
        result(bench, WANDA, 99.0),
        replace(late, facts={**late.facts, "evaluate": {"WikiText-2": "other windows"}}),
        late,
        result(bench, replace(WANDA, seed=1), facts={**late.facts, "model": "another"}),
        result(bench, replace(WANDA, seed=2), facts={**late.facts, "prune": {"recipe": ["besa"], "sparsity": 0.5}}),
        replace(late, run=replace(WANDA, recipe="forgotten")),
    ]
    assert board_of(bench, others, "m").results == [late]


def test_the_tables_go_between_the_marks_of_the_readme(tmp_path: Path) -> None:
    readme, ours = tmp_path / "README.md", (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (BENCH, SMALLER):
        begin, end = marks = marks_of(load_bench(path))
        readme.write_text(f"# A\n{begin}\nold\n{end}\n# B\n")
        rewrite(readme, marks, "new")
        assert readme.read_text() == f"# A\n{begin}\n\nnew\n\n{end}\n# B\n"
        readme.write_text(f"{end} {begin}")
        with pytest.raises(ValueError, match=r"has not the marks .*, in this order"):
            rewrite(readme, marks, "new")
        assert 0 < ours.index(begin) < ours.index(end)


def test_smaller_models_stand_in_their_table_with_what_they_weigh() -> None:
    bench = load_bench(SMALLER)
    assert {0.1, 0.2, 0.3} <= {run.sparsity for run in bench.runs()}
    run = Run(recipe="comp", sparsity=0.2, size="16x256", seed=0)
    made = result(bench, run)
    weight = Weight(
        parameters=112_697_280, part_removed=0.2056, part_idle=0.0, num_bytes=225_400_000, reading=1.25, writing=1.5
    )
    weighed = replace(made, figures=replace(made.figures, elapsed=61.0, weight=weight))
    lines = smaller_section(board_of(bench, [result(bench, None, 27.43), weighed], "m")).splitlines()
    assert "| comp | 20.6% | 112,697,280 | 225.4 MB | 50.00 | 50.00 | 1.25 | 1.50 | 61 s | 0.21 GB |" in lines
    assert "**20% of the blocks' parameters** (reading and writing: tokens a second, dense = 1):" in lines


def test_the_picture_is_small_and_always_the_same(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.bench.quality.plot import draw

    for name in ("a.svg", "b.svg"):
        draw(whole_board(bench), tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert len(drawn) < 100_000
    assert all(name in drawn.decode() for name in bench.recipes)


Opened = Callable[..., Workshop]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A bench of a tiny model, with settings changed as asked."""
    directory = tmp_path_factory.mktemp("bench")
    save_tiny("llama", directory / "model")
    (directory / "text.txt").write_text("the cat sat on the mat and saw the dog run " * 40)

    def open_one(**changed: Any) -> Workshop:
        text = {"text": "text.txt", "sequence_length": 16, "windows": 4}
        raw = {
            "name": "small", "calibrate": {"text": "text.txt"}, "sizes": ["4x16"],
            "evaluate": {"one": text, "two": text},
            "compute": {"dtype": "float32", "threads": 1}, "recipes": {"wanda": {"prune": {"recipe": ["wanda"]}}},
            "rounds": [{"priority": 1, "sparsities": [0.5], "seeds": [0]}], "references": {"dense": 1, "recipes": {}},
        }  # fmt: skip
        bench = validated(Bench, {**raw, **changed}, "a small bench")
        return open_workshop(bench, directory / "model", directory, directory / "scratch")

    return open_one


def test_seeds_are_stretches_of_the_text_that_follow_each_other(opened: Opened) -> None:
    workshop = opened()
    run = Run(recipe="wanda", sparsity=0.5, size="4x16", seed=0)
    settings = CalibrationConfig(source=workshop.bench.calibrate, sequences=8, tokens=16)
    both_NT = load_calibration(settings, workshop.model, 96).tokens_NT
    assert torch.equal(torch.cat([workshop.stretch(replace(run, seed=seed)) for seed in (0, 1)]), both_NT)
    with pytest.raises(
        CalibrationError, match="wanda 50% 4x16 seed 999 needs tokens 63936 to 64000 of the calibration"
    ):
        workshop.stretch(replace(run, seed=999))


def test_a_bench_prunes_evaluates_remembers_and_says_what_failed(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop, results = opened(), Results(tmp_path / "results.jsonl")
    (run,) = workshop.bench.runs()
    assert work_through([None, replace(run, seed=999), run], workshop, results, minutes=float("inf")) == 1
    dense, wanda = results.all
    assert (dense.run, wanda.run) == (None, run)
    assert wanda.figures.perplexity["one"] == wanda.figures.perplexity["two"] != dense.figures.perplexity["one"]
    assert wanda.figures.seconds > 0 < wanda.figures.passes
    assert not workshop.scratch.exists()
    assert "wanda 50% 4x16 seed 999 failed: wanda 50% 4x16 seed 999 needs tokens" in capsys.readouterr().err
    assert Results(tmp_path / "results.jsonl").find(run, workshop.facts(run), workshop.code) == wanda
    assert work_through([run], workshop, results, minutes=0) == 0
    assert "left out, for it would end after 0 minutes" in capsys.readouterr().err


def test_a_smaller_model_is_weighed_beside_the_dense_one(opened: Opened, tmp_path: Path) -> None:
    half = {"comp": {"prune": {"recipe": [{"comp": {"depth_fraction": 0.0}}]}}}
    workshop = opened(recipes=half, rounds=[{"priority": 1, "sparsities": [0.2], "seeds": [0]}])
    (run,) = workshop.bench.runs()
    results = Results(tmp_path / "results.jsonl")
    assert work_through([run], workshop, results, minutes=float("inf")) == 0
    (made,) = Results(tmp_path / "results.jsonl").all
    weight = made.figures.weight
    assert weight is not None
    assert made == results.all[0]
    assert weight.part_removed == pytest.approx(0.2, abs=0.02)
    assert 0 < weight.parameters < weight.num_bytes
    assert min(weight.reading, weight.writing) > 0
    assert made.figures.elapsed is not None
    assert made.figures.elapsed > made.figures.seconds


def test_a_run_that_pruned_other_than_asked_gives_no_figures() -> None:
    require_achieved(WANDA, 0.4997)
    with pytest.raises(RuntimeError, match=r"0\.4800 of the weights were pruned instead of 0\.5000"):
        require_achieved(WANDA, 0.48)
