"""Statistics are gathered once per distinct input, and dropped for all who share it."""

import pytest
import torch
from torch import nn

from pipeline.linears import Collector, find_linears
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import PrunedLinear
from pipeline.methods.wanda import Wanda
from pipeline.peers import Alone
from pipeline.prune_block import apply_recipe
from pipeline.recipe import Recipe
from pipeline.sparsity import Unstructured
from pipeline.statistics import ColumnSquares, Gram


class Gated(nn.Module):
    """`gate` and `up` share their input; `down` has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x) * self.up(x))


class Bench:
    """What linear steps see of a block, without its streams."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        block = Gated()
        self.collector = Collector(find_linears(block), (ColumnSquares, Gram))
        with torch.no_grad(), self.collector.watching(block, to_the_end=True):
            block(torch.randn(3, 20, 8))
        self.weights = {linear.name: linear.weight(block) for linear in find_linears(block)}
        self.groups, self.gathered = self.collector.groups, self.collector.gathered
        self.so_far: dict[str, PrunedLinear] = {}
        self.tuned: dict[str, torch.Tensor] = {}
        self.peers, self.cut = Alone(), None


def test_what_one_linear_forgets_all_that_share_its_input_forget() -> None:
    collector = Bench().collector
    assert [[linear.name for linear in group] for group in collector.groups()] == [["gate", "up"], ["down"]]
    collector.gathered("up").drop(Gram)
    with pytest.raises(KeyError):
        collector.gathered("gate").of(Gram)
    assert collector.gathered("gate").of(ColumnSquares).num_tokens == 60
    assert collector.gathered("down").of(Gram).num_tokens == 60


def test_a_statistic_stays_until_the_last_step_that_needs_it_has_run() -> None:
    bench, gram = Bench(), SparseGPT()
    alone, after = Recipe(steps=(Wanda(), gram)), Recipe(steps=(Wanda(), gram, gram))
    expected = _pruned(alone, Bench())
    again = _pruned(after, bench)
    for name, linear in expected.items():
        assert torch.equal(again[name].keep_OD, linear.keep_OD)
        for kind in (ColumnSquares, Gram):
            with pytest.raises(KeyError):
                bench.gathered(name).of(kind)


def _pruned(recipe: Recipe, bench: Bench) -> dict[str, PrunedLinear]:
    return apply_recipe(recipe, Unstructured(ratio=0.5), bench, lambda figures: None).linears  # type: ignore[arg-type]
