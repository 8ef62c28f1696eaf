"""Recipes: what is read, what a recipe needs, and every refusal in its words."""

from fractions import Fraction
from typing import Any

import pytest

from pipeline.methods import METHODS
from pipeline.methods.besa import Besa
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import BlockStep, LinearStep
from pipeline.methods.structured.shape_step import ShapeStep, ShortGpt, Sleb
from pipeline.methods.wanda import Wanda
from pipeline.recipe import parse_recipe
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import ColumnSquares, Gram, Moments

HALF = Unstructured(ratio=0.5)
TWO_OF_FOUR = SemiStructured(keep=2, group=4)
Entries = list[str | dict[str, Any]]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_mask])
def test_every_method_is_a_recipe_of_its_own(name: str) -> None:
    recipe = parse_recipe([name], HALF)
    (step,) = recipe.steps or [recipe.shape]
    assert type(step) is METHODS[name]
    assert isinstance(step, LinearStep) + isinstance(step, BlockStep) + isinstance(step, ShapeStep) == 1


def test_steps_come_in_order_with_their_options() -> None:
    recipe = parse_recipe([{"besa": {"epochs": 2, "granularity": "linear"}}, {"sparsegpt": {"damping": 0.1}}], HALF)
    assert recipe.steps == (Besa(epochs=2, granularity="linear"), SparseGPT(damping=0.1))


def test_a_step_that_removes_blocks_stands_apart_from_those_that_mask() -> None:
    recipe = parse_recipe([{"shortgpt": {"ratio": 0.29}}, "wanda", "sparsegpt"], TWO_OF_FOUR)
    assert recipe.shape == ShortGpt(ratio=0.29)
    assert recipe.steps == (Wanda(), SparseGPT())
    assert recipe.part_removed(TWO_OF_FOUR) == Fraction(29, 100)
    assert parse_recipe(["wanda"], HALF).part_removed(HALF) == 0
    named = [next(iter(step)) for step in recipe.as_data() if isinstance(step, dict)]
    assert named == ["shortgpt", "wanda", "sparsegpt"]


def test_alone_it_removes_as_much_as_the_run_is_asked_for() -> None:
    recipe = parse_recipe(["sleb"], Unstructured(ratio=0.3))
    assert (recipe.shape, recipe.steps) == (Sleb(), ())
    assert recipe.part_removed(Unstructured(ratio=0.3)) == Fraction(3, 10)


@pytest.mark.parametrize(
    ("entries", "sparsity", "message"),
    [
        (["wanda", {"shortgpt": {"ratio": 0.1}}], HALF, r"\[1\] shortgpt removes blocks before anything is pruned"),
        ([{"sleb": {"ratio": 0.1}}, {"shortgpt": {"ratio": 0.1}}, "wanda"], HALF, r"\[1\] shortgpt .* only one such"),
        ([{"shortgpt": {"ratio": 0.2}}], HALF, r"shortgpt\.ratio is for .*: leave .* set prune\.sparsity to 0\.2"),
        (["sleb", "wanda"], HALF, r"\[0\] sleb\.ratio is missing: with further steps, prune\.sparsity is what"),
        (["shortgpt"], TWO_OF_FOUR, r"shortgpt removes whole blocks, which have no pattern such as 2:4; give a"),
        ([{"shortgpt": {"ratio": 0.2}}, "dsnot"], HALF, r"\[1\] dsnot refines a mask; put a step that chooses one"),
        ([{"shortgpt": {"ratio": 0.2}}, "wanda", "besa"], HALF, r"\[2\] besa chooses a mask .* but wanda has chosen"),
        ([{"shortgpt": {"depth": "best"}}], HALF, r"shortgpt\.depth: Input should be 'one_shot', 'rescored' or"),
        ([{"shortgpt": {"ratio": 1}}, "wanda"], HALF, r"shortgpt\.ratio: Input should be less than 1"),
    ],
)  # fmt: skip
def test_what_cannot_remove_blocks_so_is_refused(entries: Entries, sparsity: Sparsity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(entries, sparsity)


@pytest.mark.parametrize("entry", ["wanda", {"wanda": None}, {"wanda": {}}])
def test_a_step_without_options_has_the_defaults(entry: str | dict[str, Any]) -> None:
    assert parse_recipe([entry], HALF).steps == (Wanda(),)


@pytest.mark.parametrize(
    "entries", [["wanda"], ["magnitude"], ["sparsegpt"], ["wanda", "sparsegpt"], ["admm"], ["wanda", "alps"]]
)
def test_patterns_go_with_every_method_that_does_not_learn_counts(entries: Entries) -> None:
    assert len(parse_recipe(entries, TWO_OF_FOUR).steps) == len(entries)


def test_besa_prunes_to_a_mix_of_patterns() -> None:
    assert parse_recipe([{"besa": {"mix": True}}, "sparsegpt"], TWO_OF_FOUR).steps == (Besa(mix=True), SparseGPT())


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (1, 4), (3, 4), (7, 8)])
def test_what_can_only_be_mixed_as_it_is_goes_with_grids_to_learn(keep: int, group: int) -> None:
    asked = SemiStructured(keep=keep, group=group)
    with pytest.raises(
        ValueError, match=rf"keeps 1 to {group - 1} .*, so that {asked} on average is {asked} everywhere"
    ):
        parse_recipe([{"besa": {"mix": True}}], asked)
    assert parse_recipe([{"besa": {"mix": True, "quantize": {"bits": 3}}}], asked).steps[0].quantises


def test_what_is_asked_of_a_mix_is_left_open_where_no_sparsity_is_known() -> None:
    assert parse_recipe([{"besa": {"mix": True}}], None) == parse_recipe([{"besa": {"mix": True}}], TWO_OF_FOUR)


def test_a_step_that_quantises_comes_last() -> None:
    entries: Entries = ["wanda", {"besa": {"quantize": {"bits": 3}}}]
    assert parse_recipe(entries[1:], HALF).steps[0].quantises
    message = (
        r"^\[1\] sparsegpt would take weights off the grids that besa has put them on; quantize in the last step only$"
    )
    with pytest.raises(ValueError, match=message):
        parse_recipe([*entries[1:], "sparsegpt"], HALF)


@pytest.mark.parametrize(
    ("entries", "statistics", "targets", "dense_stream"),
    [
        (["magnitude"], (), False, False),
        (["wanda"], (ColumnSquares,), False, False),
        (["wanda", "sparsegpt"], (ColumnSquares, Gram), False, False),
        (["sparsegpt", "sparsegpt"], (Gram,), False, False),
        (["wanda", "dsnot"], (ColumnSquares, Gram), False, False),
        (["wanda", {"dsnot": {"criterion": "mean"}}], (ColumnSquares, Moments, Gram), False, False),
        ([{"besa": {"target": "pruned"}}], (ColumnSquares,), True, False),
        ([{"besa": {"target": "dense"}}, "sparsegpt"], (ColumnSquares, Gram), False, True),
    ],
)
def test_a_recipe_needs_what_its_steps_need(
    entries: Entries, statistics: tuple[type, ...], targets: bool, dense_stream: bool
) -> None:
    recipe = parse_recipe(entries, HALF)
    assert recipe.statistics == statistics
    assert recipe.needs_targets is targets
    assert recipe.needs_dense_stream is dense_stream


def test_a_recipe_as_data_reads_back_as_itself() -> None:
    recipe = parse_recipe([{"magnitude": {"scope": "row"}}, "sparsegpt"], HALF)
    data = recipe.as_data()
    assert data == [
        {"magnitude": Magnitude(scope="row").model_dump()},
        {"sparsegpt": SparseGPT().model_dump()},
    ]
    assert parse_recipe(data, HALF) == recipe  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "sparsity", "message"),
    [
        ([], HALF, r"^a recipe needs at least one step$"),
        (["wnada"], HALF, r"^\[0\] no method is called 'wnada'; did you mean 'wanda'\? Known: magnitude, wanda, "),
        (["lottery"], HALF, r"^\[0\] no method is called 'lottery'\. Known: magnitude, wanda, sparsegpt, besa"),
        ([{4: {}}], HALF, r"^\[0\] no method is called 4"),
        ([{"besa": {}, "wanda": {}}], HALF, r"^\[0\] a step is a name or one `name: \{options\}`, not \{'besa': "),
        ([{}], HALF, r"^\[0\] a step is a name or one `name: \{options\}`, not \{\}$"),
        (["wanda", {"besa": {"epoch": 1}}], HALF, r"^\[1\] besa\.epoch: .* \(options: target, epochs, batch, "),
        ([{"wanda": {"scope": 1}}], HALF, r"^\[0\] wanda\.scope: .* \(options: none\)$"),
        ([{"besa": {"epochs": 0}}], HALF, r"^\[0\] besa\.epochs: Input should be greater than or equal to 1"),
        ([{"besa": {"quantize": {"bits": 1}}}], HALF, r"^\[0\] besa\.quantize\.bits: Input should be greater than or"),
        ([{"magnitude": {"scope": "block"}}], HALF, r"^\[0\] magnitude\.scope: Input should be 'matrix' or 'row'"),
        ([{"sparsegpt": {"damping": 2}}], HALF, r"^\[0\] sparsegpt\.damping: Input should be less than or equal to 1"),
        ([{"besa": [1]}], HALF, r"^\[0\] besa: Input should be a valid dictionary"),
        ([{"besa": 0}], HALF, r"^\[0\] besa: Input should be a valid dictionary"),
        (["wanda", "magnitude"], HALF, r"^\[1\] magnitude chooses a mask of its own, but wanda has chosen one before"),
        (["sparsegpt", "besa"], HALF, r"^\[1\] besa chooses a mask .*; put it first, or leave one of them out$"),
        (["besa"], TWO_OF_FOUR, r"^\[0\] besa learns how many weights each row drops, which 2:4 fixes; use wanda or"),
        (
            [{"besa": {"mix": True}}, "sparsegpt"],
            Unstructured(ratio=0.6),
            r"^\[0\] besa's `mix` .*, and the fraction 0\.6 has no groups; leave `mix` out, or ask for a pattern .*$",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_words(entries: Entries, sparsity: Sparsity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(entries, sparsity)


def test_all_problems_are_told_at_once_one_a_line() -> None:
    with pytest.raises(ValueError, match="besa") as refusal:
        parse_recipe([{"besa": {"epochs": 0, "batch": 0}}, "foo", "wanda", {"sparsegpt": {"slab": 0}}], HALF)
    starts = [line.split(":")[0] for line in str(refusal.value).splitlines()]
    assert starts == ["[0] besa.epochs", "[0] besa.batch", "[1] no method is called 'foo'. Known", "[3] sparsegpt.slab"]


def test_every_disagreement_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="besa learns") as refusal:
        parse_recipe(["besa", "wanda", "magnitude"], TWO_OF_FOUR)
    assert [line[:10] for line in str(refusal.value).splitlines()] == ["[0] besa l", "[1] wanda ", "[2] magnit"]
