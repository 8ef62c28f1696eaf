"""One block on the bench: its dense weights, its streams and statistics, and the recipe worked through on it."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.activations import Boundary
from pipeline.linears import Collector, Linear
from pipeline.methods.step import BlockStep, LinearStep, PrunedLinear, Report
from pipeline.recipe import Recipe
from pipeline.sparsity import Sparsity
from pipeline.statistics import Statistic
from pipeline.stream import Stream


class Workbench:
    """A block and its streams, as block steps see them (the protocol `BlockView`)."""

    def __init__(
        self,
        stream: Stream,
        block: nn.Module,
        index: int,
        linears: Sequence[Linear],
        collector: Collector,
        inputs: Boundary,
        targets: torch.Tensor,
    ) -> None:
        self._stream, self._index = stream, index
        self._linears = {linear.name: linear for linear in linears}
        self._collector, self._inputs, self._targets = collector, inputs, targets
        self.weights = {linear.name: linear.weight(block) for linear in linears}

    @property
    def num_sequences(self) -> int:
        """Calibration sequences at hand."""
        return self._inputs.num_sequences

    def groups(self) -> list[list[Linear]]:
        """Return the linears grouped by the input they share."""
        return self._collector.groups()

    def statistic(self, name: str, kind: type[Statistic]) -> Statistic:
        """Return the statistic of a linear's inputs."""
        return self._collector.statistic(name, kind)

    def output(self, weights: Mapping[str, torch.Tensor], sequences: slice) -> torch.Tensor:
        """Run the block on the pruned stream with other weights."""
        stored = {self._linears[name].parameter: self._linears[name].to_stored(w) for name, w in weights.items()}
        device = next(iter(weights.values())).device
        return self._stream.run_block(self._index, self._inputs.read(sequences, device), stored)

    def target(self, sequences: slice) -> torch.Tensor:
        """Return the hidden_BTD that the pruned block is to reproduce."""
        return self._targets[sequences].to(next(iter(self.weights.values())).device)


def apply_recipe(recipe: Recipe, sparsity: Sparsity, bench: Workbench, report: Report) -> dict[str, PrunedLinear]:
    """Run the steps in turn; each linear ends with the mask, weights and notes of all of them."""
    state: dict[str, PrunedLinear] = {}
    for step in recipe.steps:
        if isinstance(step, BlockStep):
            results = step.prune(bench, sparsity, report)
        else:
            assert isinstance(step, LinearStep)
            results = _run_linear_step(step, sparsity, bench, state)
        for name, result in results.items():
            before = state.get(name)
            weight = result.weight_OD if result.weight_OD is not None or before is None else before.weight_OD
            notes = {**(before.notes if before else {}), **result.notes}
            state[name] = PrunedLinear(keep_OD=result.keep_OD, weight_OD=weight, notes=notes)
    return state


@torch.no_grad()
def _run_linear_step(
    step: LinearStep, sparsity: Sparsity, bench: Workbench, state: Mapping[str, PrunedLinear]
) -> dict[str, PrunedLinear]:
    results = {}
    for group in bench.groups():
        kind = step.statistic
        solve = step.solver(None if kind is None else bench.statistic(group[0].name, kind))
        for linear in group:
            before = state.get(linear.name)
            weight = bench.weights[linear.name]
            if before is not None and before.weight_OD is not None:
                weight = before.weight_OD
            results[linear.name] = solve(weight, before.keep_OD if before else None, sparsity)
    return results
