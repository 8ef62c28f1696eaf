"""One block on the bench: its dense weights, its streams and statistics, and the recipe worked through on it."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from pipeline.activations import Boundary
from pipeline.lazy_weights import Maker
from pipeline.linears import Collector, Linear
from pipeline.methods.step import BlockStep, LinearStep, MiniBatch, PrunedLinear, Report
from pipeline.peers import Peers
from pipeline.recipe import Recipe
from pipeline.sharing import share_out, solve_rows, spread
from pipeline.sparsity import Sparsity, kept_in_rows
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
        targets: Boundary,
        peers: Peers,
    ) -> None:
        self._stream, self._index = stream, index
        self._linears = {linear.name: linear for linear in linears}
        self._collector, self._inputs, self._targets = collector, inputs, targets
        self.weights = {linear.name: linear.weight(block) for linear in linears}
        self.peers = peers

    @property
    def num_replicas(self) -> int:
        """Replicas that work on this block, each with its own part of the sequences."""
        return self.peers.size

    def mini_batches(self, size: int) -> list[MiniBatch]:
        """Return the updates of one pass over the calibration: `size` sequences of every replica in each."""
        counts = torch.zeros(self.peers.size, dtype=torch.float64, device=self._device)
        counts[self.peers.rank] = self._inputs.num_sequences
        self.peers.sum([counts])
        updates = []
        for start in range(0, int(counts.max()), size):
            parts = (counts - start).clamp(0, size)
            here = int(parts[self.peers.rank])
            updates.append(MiniBatch(here=slice(start, start + here), weight=here / parts.sum().item()))
        coming = [update.here for update in updates if update.weight > 0]
        self._inputs.expect(coming)
        self._targets.expect(coming)
        return updates

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors (gradients), in place, by their sums over all replicas."""
        self.peers.sum(tensors)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def groups(self) -> list[list[Linear]]:
        """Return the linears grouped by the input they share."""
        return self._collector.groups()

    def statistic(self, name: str, kind: type[Statistic]) -> Statistic:
        """Return the statistic of a linear's inputs."""
        return self._collector.statistic(name, kind)

    def forget(self, name: str, kind: type[Statistic] | None) -> None:
        """Drop the statistic of a linear's inputs, where there is one, once no later step needs it."""
        if kind is not None:
            self._collector.forget(name, kind)

    def output(self, weights: Mapping[str, Maker], sequences: slice) -> torch.Tensor:
        """Run the block on the pruned stream with other weights, each made when its linear runs."""
        stored = {self._linears[n].parameter: partial(_stored, self._linears[n], w) for n, w in weights.items()}
        return self._stream.run_block(self._index, self._inputs.read(sequences, self._device), stored)

    def target(self, sequences: slice) -> torch.Tensor:
        """Return the hidden_BTD that the pruned block is to reproduce."""
        return self._targets.read(sequences, self._device)


def _stored(linear: Linear, make: Maker) -> torch.Tensor:
    return linear.to_stored(make())


def apply_recipe(recipe: Recipe, sparsity: Sparsity, bench: Workbench, report: Report) -> dict[str, PrunedLinear]:
    """Run the steps in turn; each linear ends with the mask, weights and notes of all of them.

    Replicas share the work of linear steps, and end with the same bits, or with a NumericsError.
    """
    state: dict[str, PrunedLinear] = {}
    for position, step in enumerate(recipe.steps):
        if isinstance(step, BlockStep):
            results = step.prune(bench, sparsity, report)
        else:
            assert isinstance(step, LinearStep)
            is_last_use = step.statistic not in {later.statistic for later in recipe.steps[position + 1 :]}
            results = _run_linear_step(step, sparsity, bench, state, is_last_use)
        for name, result in results.items():
            before = state.get(name)
            weight = result.weight_OD if result.weight_OD is not None or before is None else before.weight_OD
            notes = {**(before.notes if before else {}), **result.notes}
            state[name] = PrunedLinear(keep_OD=result.keep_OD, weight_OD=weight, notes=notes)
    kept_rows = [kept_in_rows(linear.keep_OD) for linear in state.values()]
    bench.peers.agree(torch.cat(kept_rows), "how many weights each row keeps")
    return state


@torch.no_grad()
def _run_linear_step(
    step: LinearStep, sparsity: Sparsity, bench: Workbench, state: Mapping[str, PrunedLinear], is_last_use: bool
) -> dict[str, PrunedLinear]:
    """Prune every linear; statistics are dropped when they have been used for the last time."""
    groups = bench.groups()
    owners = share_out([sum(_effort(bench.weights[n.name]) for n in group) for group in groups], bench.peers.size)
    by_rows = step.rows_alone(sparsity)
    results: dict[str, PrunedLinear] = {}
    for group, owner in zip(groups, owners, strict=True):
        if by_rows or owner == bench.peers.rank:
            results |= _solve_group(step, sparsity, bench, group, state, is_last_use)
        elif is_last_use:
            bench.forget(group[0].name, step.statistic)
    if by_rows:
        return results
    return {  # all replicas have solved what they own before any waits for another's
        linear.name: spread(results.get(linear.name), bench.weights[linear.name], bench.peers, owner)
        for group, owner in zip(groups, owners, strict=True)
        for linear in group
    }


def _solve_group(
    step: LinearStep,
    sparsity: Sparsity,
    bench: Workbench,
    group: Sequence[Linear],
    state: Mapping[str, PrunedLinear],
    is_last_use: bool,
) -> dict[str, PrunedLinear]:
    """Prune the linears of one input."""
    kind, name = step.statistic, group[0].name
    solve = step.solver(None if kind is None else bench.statistic(name, kind))
    if is_last_use:
        bench.forget(name, kind)
    results: dict[str, PrunedLinear] = {}
    for linear in group:
        before = state.get(linear.name)
        weight_OD, keep_OD = bench.weights[linear.name], None
        if before is not None:
            weight_OD, keep_OD = weight_OD if before.weight_OD is None else before.weight_OD, before.keep_OD
        if step.rows_alone(sparsity):
            results[linear.name] = solve_rows(solve, weight_OD, keep_OD, sparsity, bench.peers)
        else:
            results[linear.name] = solve(weight_OD, keep_OD, sparsity)
    return results


def _effort(weight_OD: torch.Tensor) -> float:
    """Judge the work of solving one linear: rows times columns squared, as a factorisation and its updates take."""
    num_rows, num_columns = weight_OD.shape
    return float(num_rows + num_columns) * num_columns**2
