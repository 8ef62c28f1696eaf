"""Every recipe on three kinds of block (LLaMA's, gpt2's Conv1D, gpt-neox's fused projections) counts exactly."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import floor
from pathlib import Path

import pytest
import torch

from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.verify import verify
from tests.integration.support import RecipeEntries, by_rows, carry_out, job, load, same_bits, tensors_in, write_text
from tests.tiny import save_tiny

FAMILIES = ["llama", "gpt2", "gpt-neox"]
Weights = dict[str, torch.Tensor]
"""weight_OD by tensor name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recipe and where its weights compete: within a matrix, a row, a group of a row, or a block."""

    recipe: RecipeEntries
    sparsity: float | str = 0.55
    unit: str
    rewrites: bool = False


TUNED = {"reconstruct": {"norms": True, "epochs": 2, "target": "pruned"}}
GRADUAL = {"reconstruct": {"gradual": True, "held_out": 0, "epochs": 2}}

CASES = {
    "magnitude": Case(recipe=["magnitude"], unit="matrix"),
    "magnitude by row": Case(recipe=[{"magnitude": {"scope": "row"}}], unit="row"),
    "magnitude 2:4": Case(recipe=["magnitude"], sparsity="2:4", unit="group"),
    "wanda": Case(recipe=["wanda"], unit="row"),
    "wanda 2:4": Case(recipe=["wanda"], sparsity="2:4", unit="group"),
    "wanda 3:8": Case(recipe=["wanda"], sparsity="3:8", unit="group"),
    "sparsegpt": Case(recipe=["sparsegpt"], unit="matrix", rewrites=True),
    "sparsegpt in slabs": Case(recipe=[{"sparsegpt": {"slab": 5}}], unit="matrix", rewrites=True),
    "sparsegpt 2:4": Case(recipe=["sparsegpt"], sparsity="2:4", unit="group", rewrites=True),
    "admm": Case(recipe=["admm"], unit="row", rewrites=True),
    "admm by matrix": Case(recipe=[{"admm": {"scope": "matrix"}}], unit="matrix", rewrites=True),
    "alps 2:4": Case(recipe=["alps"], sparsity="2:4", unit="group", rewrites=True),
    "besa, admm": Case(recipe=["besa", "admm"], unit="block", rewrites=True),
    "besa": Case(recipe=["besa"], unit="block"),
    "besa by linear": Case(recipe=[{"besa": {"granularity": "linear", "target": "dense"}}], unit="block"),
    "wanda, sparsegpt": Case(recipe=["wanda", "sparsegpt"], unit="row", rewrites=True),
    "besa, sparsegpt": Case(recipe=["besa", "sparsegpt"], unit="block", rewrites=True),
    "wanda, dsnot": Case(recipe=["wanda", "dsnot"], unit="row"),
    "wanda, dsnot by mean": Case(recipe=["wanda", {"dsnot": {"criterion": "mean", "guard": "none"}}], unit="row"),
    "wanda, dsnot 2:4": Case(recipe=["wanda", "dsnot"], sparsity="2:4", unit="group"),
    "besa, dsnot": Case(recipe=["besa", "dsnot"], unit="block"),
    "wanda, reconstruct": Case(recipe=["wanda", TUNED], unit="row", rewrites=True),
    "magnitude, reconstruct": Case(recipe=["magnitude", TUNED], unit="matrix", rewrites=True),
    "admm, reconstruct 2:4": Case(recipe=["admm", TUNED], sparsity="2:4", unit="group", rewrites=True),
    "besa, reconstruct": Case(recipe=["besa", {"reconstruct": {"held_out": 0}}], unit="block", rewrites=True),
    "besa, reconstruct gradually": Case(recipe=["besa", GRADUAL], unit="block", rewrites=True),
    "wanda, reconstruct gradually 2:4": Case(recipe=["wanda", GRADUAL], sparsity="2:4", unit="group", rewrites=True),
    "sparsegpt, dsnot": Case(recipe=["sparsegpt", "dsnot"], unit="matrix", rewrites=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("recipes")
    write_text(base)
    for family in FAMILIES:
        save_tiny(family, base / family)
    return base


@pytest.fixture(scope="module")
def weights_of(base: Path) -> Callable[[str, str], Weights]:
    """Run a case on a family, once, and give the matrices it made."""

    @cache
    def run_and_read(family: str, name: str) -> Weights:
        case, output = CASES[name], base / f"{family} {name}"
        carry_out(job(base / family, output, case.recipe, case.sparsity, evaluate=None))
        return by_rows(load(base / family), tensors_in(output / "model"))

    return run_and_read


def pruned_of(ratio: float, numel: int) -> int:
    """The count asked for: rounded down from the ratio as it is written, not from its binary neighbour."""
    return floor(Fraction(str(ratio)) * numel)


def by_block(weights: Weights) -> dict[str, list[torch.Tensor]]:
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        blocks.setdefault(next(part for part in name.split(".") if part.isdigit()), []).append(weight)
    return blocks


def units(weights: Weights, unit: str, sparsity: float | str) -> list[torch.Tensor]:
    """The weights as [number of units, weights in each]: each unit loses its share."""
    if unit == "block":
        return [torch.cat([w.flatten() for w in block])[None] for block in by_block(weights).values()]
    if unit == "group":
        return [w.reshape(-1, int(str(sparsity).split(":")[1])) for w in weights.values()]
    return [w.reshape(1, -1) if unit == "matrix" else w for w in weights.values()]


def expected_zeros(sparsity: float | str, numel: int) -> int:
    if isinstance(sparsity, str):
        kept, group = map(int, sparsity.split(":"))
        return numel // group * (group - kept)
    return pruned_of(sparsity, numel)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_drops_exactly_what_was_asked_and_verify_agrees(
    family: str, name: str, base: Path, weights_of: Callable[[str, str], Weights]
) -> None:
    case, weights = CASES[name], weights_of(family, name)
    for unit in units(weights, case.unit, case.sparsity):
        assert ((unit == 0).sum(dim=1) == expected_zeros(case.sparsity, unit.shape[1])).all()
    source = by_rows(load(base / family), tensors_in(base / family))
    changed = [n for n, weight in weights.items() if not same_bits(weight[weight != 0], source[n][weight != 0])]
    assert changed == (list(weights) if case.rewrites else [])
    verify(base / f"{family} {name}", base / family, Silent())


@pytest.mark.parametrize("first", ["wanda", "besa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsegpt_after_another_method_keeps_its_masks_and_updates_the_weights(
    family: str, first: str, weights_of: Callable[[str, str], Weights]
) -> None:
    alone, followed = weights_of(family, first), weights_of(family, f"{first}, sparsegpt")
    in_first_block = [name for name in alone if ".0." in name]  # later blocks see other hidden states
    assert in_first_block
    for name in in_first_block:
        assert torch.equal(alone[name] != 0, followed[name] != 0), name
        assert not torch.equal(alone[name], followed[name]), name


def test_the_report_tells_the_swaps_and_errors_of_every_linear(base: Path, tmp_path: Path) -> None:
    report = carry_out(job(base / "llama", tmp_path, ["wanda", "dsnot"], evaluate=None))
    assert {f"{block}.mlp.up_proj" for block in range(3)} < set(report.linears)
    for notes in report.linears.values():
        assert 0 < notes["dsnot.error_after"] < notes["dsnot.error_before"]
        assert notes["dsnot.swaps"] > 0
    assert report.as_json()["linears"] == report.linears


@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.3, 0.7, 0.95])
def test_besa_meets_any_budget_to_the_weight(ratio: float, base: Path, tmp_path: Path) -> None:
    report = carry_out(job(base / "llama", tmp_path, ["besa"], ratio, evaluate=None))
    blocks = by_block(by_rows(load(base / "llama"), tensors_in(tmp_path / "model")))
    zeros = [sum(int((w == 0).sum()) for w in block) for block in blocks.values()]
    assert zeros == [pruned_of(ratio, 7680)] * 3
    assert report.pruned_weights == sum(zeros)


def test_besa_lets_rows_differ_and_wanda_does_not(weights_of: Callable[[str, str], Weights]) -> None:
    by_method = {name: weights_of("llama", name).values() for name in ("wanda", "besa")}
    spread = {n: max(len(set((w == 0).sum(dim=1).tolist())) for w in weights) for n, weights in by_method.items()}
    assert spread["wanda"] == 1
    assert spread["besa"] > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_wandas_masks_do_not_depend_on_the_batch(family: str, base: Path, tmp_path: Path) -> None:
    for batch in (1, 4):
        carry_out(job(base / family, tmp_path / str(batch), ["wanda"], compute={"batch": batch}, evaluate=None))
    alone, together = (tensors_in(tmp_path / str(batch) / "model") for batch in (1, 4))
    assert [name for name in alone if not same_bits(alone[name], together[name])] == []


@pytest.mark.parametrize("granularity", ["row", "linear"])
@pytest.mark.parametrize("after", [[], ["dsnot"], ["sparsegpt"]])
def test_a_mix_of_patterns_keeps_within_the_budget_and_every_linear_says_its_own(
    granularity: str, after: list[str], base: Path, tmp_path: Path
) -> None:
    recipe: RecipeEntries = [{"besa": {"mix": True, "granularity": granularity}}, *after]
    carry_out(job(base / "llama", tmp_path / "run", recipe, "2:4", evaluate=None))
    for commit in Ledger.read(tmp_path / "run").commits.values():
        records = commit.linears.values()
        numel = sum(record.numel for record in records)
        assert numel / 2 <= sum(record.pruned for record in records) < 0.52 * numel
        assert all(re.fullmatch(r"[123]:4", record.sparsity) for record in records)
    for weight in by_rows(load(base / "llama"), tensors_in(tmp_path / "run" / "model")).values():
        kept_OG = (weight.reshape(len(weight), -1, 4) != 0).sum(dim=2)
        assert (kept_OG == kept_OG[:, :1]).all()
    verify(tmp_path / "run", base / "llama", Silent())


def test_quantised_weights_take_few_values_in_every_grid(base: Path, tmp_path: Path) -> None:
    recipe: RecipeEntries = [{"besa": {"quantize": {"bits": 3, "group": 8}}}]
    report = carry_out(job(base / "llama", tmp_path / "run", recipe, 0.5, evaluate=None))
    weights = by_rows(load(base / "llama"), tensors_in(tmp_path / "run" / "model"))
    assert report.pruned_weights == sum(w.numel() for w in weights.values()) // 2
    for weight in weights.values():
        assert all(len(grid.unique()) <= 8 for grid in weight.reshape(-1, 8))
    verify(tmp_path / "run", base / "llama", Silent())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_sequence_the_first_input_is_judged_as_jointly_and_the_last_is_not(
    family: str, base: Path, weights_of: Callable[[str, str], Weights], tmp_path: Path
) -> None:
    settings = job(base / family, tmp_path, ["sparsegpt"], 0.55, evaluate=None)
    settings["prune"]["within_block"] = "sequential"
    carry_out(settings)
    verify(tmp_path, base / family, Silent())
    found, jointly = by_rows(load(base / family), tensors_in(tmp_path / "model")), weights_of(family, "sparsegpt")
    same = [name for name in jointly if ".0." in name and torch.equal(found[name], jointly[name])]
    others = [name for name in jointly if ".0." in name and name not in same]
    first = ("q_proj", "k_proj", "v_proj", "c_attn", "query_key_value")
    assert {name for name in jointly if ".0." in name and any(part in name for part in first)} <= set(same)
    assert any(part in name for name in others for part in ("down_proj", "mlp.c_proj", "dense_4h_to_h"))


def test_tuned_norms_are_named_in_the_ledger_and_no_other_tensor_is_touched(base: Path, tmp_path: Path) -> None:
    carry_out(job(base / "llama", tmp_path, ["wanda", TUNED], evaluate=None))
    for commit in Ledger.read(tmp_path).commits.values():
        assert commit.tuned == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    verification = verify(tmp_path, base / "llama", Silent())
    assert verification.tensors == verification.identical_tensors + verification.pruned_tensors + 2 * 3


def test_what_is_skipped_is_not_tuned_either(base: Path, tmp_path: Path) -> None:
    settings = job(base / "llama", tmp_path, ["wanda", TUNED], evaluate=None)
    settings["prune"]["skip"] = ["mlp.down_proj"]
    carry_out(settings)
    before, after = tensors_in(base / "llama"), tensors_in(tmp_path / "model")
    assert all(same_bits(before[name], after[name]) for name in before if "down_proj" in name)
