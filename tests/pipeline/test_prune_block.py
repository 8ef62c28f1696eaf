"""A recipe on one block: `joint` judges by the dense block's inputs, `sequential` by those of what is pruned so far."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.activations import in_memory
from pipeline.lazy_weights import Maker, made_on_demand
from pipeline.linears import Collector, find_linears
from pipeline.methods.step import BlockStep, BlockView, PrunedBlock, PrunedLinear, Report, Shapes
from pipeline.peers import Alone
from pipeline.prune_block import apply_recipe
from pipeline.recipe import Recipe, parse_recipe
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import Gram, Statistic
from pipeline.stream_names import StreamName
from pipeline.workbench import Workbench
from tests import reference

HALF = Unstructured(ratio=0.5)


class Gated(nn.Module):
    """`down` is declared first and runs last; `gate` and `up` share their input, and make that of `down`."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(24, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.gate(self.scale * x)) * self.up(self.scale * x))


class GatedStream:
    """Runs the block, as `Stream` runs a model's."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def run_block(self, index: int, hidden_BTD: torch.Tensor, weights: Mapping[str, Maker] | None = None) -> Any:
        with made_on_demand(self.block, weights or {}):
            return self.block(hidden_BTD)


class Laid:
    """A collected block on a bench; gate and up read a scaled copy each, so that who shares is seen by equality."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.block = Gated().requires_grad_(False)
        self.x_NTD = torch.randn(6, 10, 16) * torch.linspace(0.1, 3, 16)
        inputs = in_memory().boundary("pruned", (6, 10, 16), torch.float32)
        inputs.write(slice(0, 6), self.x_NTD, "the test")
        linears = find_linears(self.block)
        collector = Collector(linears, recipe.statistics)
        with torch.no_grad(), collector.watching(self.block, to_the_end=True):
            self.block(self.x_NTD)
        stream: Any = GatedStream(self.block)
        self.bench = Workbench(stream, self.block, 0, linears, collector, inputs, {}, Alone())

    def inputs_of_down(self, gate_OD: torch.Tensor, up_OD: torch.Tensor) -> torch.Tensor:
        x_TD = self.x_NTD.flatten(0, 1)
        return torch.relu(x_TD @ gate_OD.T) * (x_TD @ up_OD.T)


def pruned(recipe: Recipe, sparsity: Sparsity = HALF) -> tuple[Laid, dict[str, PrunedLinear]]:
    laid = Laid(recipe)
    return laid, apply_recipe(recipe, sparsity, laid.bench, lambda figures: None, batch=4).linears


def recipe_of(*names: str, within_block: Any) -> Recipe:
    return parse_recipe(list(names), HALF, within_block)


def test_statistics_are_gathered_anew_of_the_first_sequences_alone_where_others_are_held_out() -> None:
    laid = Laid(recipe_of("sparsegpt", within_block="joint"))
    down = [linear for linear in find_linears(laid.block) if linear.name == "down"]
    gram = laid.bench.collect_again(down, [Gram], 4, 5).of(Gram)
    x_TD = laid.inputs_of_down(laid.block.gate.weight, laid.block.up.weight)[:50]
    assert gram.num_tokens == 50
    torch.testing.assert_close(gram.gram_DD, x_TD.T @ x_TD, rtol=1e-4, atol=1e-4)


def wandas_choice(weight_OD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    return reference.keep_in_rows(reference.wanda_scores(weight_OD, x_TD), weight_OD.shape[1] // 2)


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_a_linear_is_judged_by_the_inputs_that_it_was_promised(within_block: str) -> None:
    laid, made = pruned(recipe_of("wanda", within_block=within_block))
    x_TD, block = laid.x_NTD.flatten(0, 1), laid.block
    gate_OD, up_OD = block.gate.weight.data, block.up.weight.data
    assert torch.equal(made["gate"].keep_OD, wandas_choice(gate_OD, x_TD))
    if within_block == "sequential":
        gate_OD, up_OD = gate_OD * made["gate"].keep_OD, up_OD * made["up"].keep_OD
    assert torch.equal(made["down"].keep_OD, wandas_choice(block.down.weight.data, laid.inputs_of_down(gate_OD, up_OD)))


def test_the_two_ways_differ_here() -> None:
    joint, sequential = (pruned(recipe_of("wanda", within_block=way))[1] for way in ("joint", "sequential"))
    assert torch.equal(joint["up"].keep_OD, sequential["up"].keep_OD)
    assert not torch.equal(joint["down"].keep_OD, sequential["down"].keep_OD)


def test_weights_that_earlier_steps_have_changed_are_what_later_inputs_come_through() -> None:
    laid, made = pruned(recipe_of("wanda", "sparsegpt", within_block="sequential"))
    gate, up, down = (made[name] for name in ("gate", "up", "down"))
    assert gate.weight_OD is not None
    assert up.weight_OD is not None
    x_TD = laid.inputs_of_down(gate.weight_OD, up.weight_OD)
    assert torch.equal(down.keep_OD, wandas_choice(laid.block.down.weight.data, x_TD))
    expected = reference.output_error(laid.block.down.weight.data * down.keep_OD, laid.block.down.weight.data, x_TD)
    assert down.weight_OD is not None
    assert reference.output_error(down.weight_OD, laid.block.down.weight.data, x_TD) < expected


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_statistics_are_gone_when_the_recipe_is_through(within_block: str) -> None:
    laid, _ = pruned(recipe_of("wanda", "sparsegpt", "sparsegpt", within_block=within_block))
    assert all(not list(laid.bench.gathered(name)) for name in ("gate", "up", "down"))


def test_a_recipe_that_nothing_is_gathered_for_is_refused_in_sequence() -> None:
    with pytest.raises(ValueError, match=r"within_block: sequential gathers statistics anew .* leave it out"):
        recipe_of("magnitude", within_block="sequential")


class KeepOneOfFour(BlockStep):
    """Chooses a pattern of its own, sees what came before it, and tunes the scale."""

    target: StreamName = "pruned"
    epochs: int = 1
    batch: int = 1

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return ()

    def working_bytes(self, shapes: Shapes, groups: Any, dtype: torch.dtype) -> int:
        return 0

    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> PrunedBlock:
        assert block.others.keys() == {"scale"}
        masks = {
            name: torch.arange(weight.shape[1]).expand(weight.shape) % 4 == 0 for name, weight in block.weights.items()
        }
        linears = {
            name: PrunedLinear(keep_OD=keep, notes={"before": float(len(block.so_far))}, sparsity=ONE_OF_FOUR)
            for name, keep in masks.items()
        }
        return PrunedBlock(linears=linears, others={"scale": 2 * block.others["scale"]})


ONE_OF_FOUR = SemiStructured(keep=1, group=4)


def test_a_sparsity_that_a_step_has_chosen_holds_for_the_steps_after_it_and_is_what_is_recorded() -> None:
    recipe = replace(
        recipe_of("sparsegpt", within_block="joint"), steps=(KeepOneOfFour(), *parse_recipe(["sparsegpt"], HALF).steps)
    )
    laid = Laid(recipe)
    made = apply_recipe(recipe, HALF, laid.bench, lambda figures: None)
    assert torch.equal(made.others["scale"], torch.full((16,), 2.0))
    for linear in made.linears.values():
        assert linear.sparsity == ONE_OF_FOUR
        assert linear.notes["keeponeoffour.before"] == 0
        assert linear.weight_OD is not None
        assert int(linear.keep_OD.count_nonzero()) * 4 == linear.keep_OD.numel()


def test_without_a_choice_of_its_own_a_linear_was_pruned_to_what_was_asked_of_the_block() -> None:
    for linear in pruned(recipe_of("wanda", within_block="joint"), ONE_OF_FOUR)[1].values():
        assert linear.sparsity == ONE_OF_FOUR
