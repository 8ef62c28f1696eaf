"""A recipe worked through on one block: its steps in turn, each on what those before have made."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from pipeline.linears import Linear
from pipeline.methods.step import BlockStep, LinearStep, LinearView, PrunedBlock, PrunedLinear, Report, Step
from pipeline.recipe import Recipe, WithinBlock
from pipeline.sharing import share_out, solve_rows, spread
from pipeline.sparsity import Sparsity, kept_in_rows
from pipeline.statistics import Gathered, Statistic
from pipeline.workbench import Workbench


def apply_recipe(
    recipe: Recipe,
    sparsity: Sparsity,
    bench: Workbench,
    report: Report,
    batch: int = 1,
) -> PrunedBlock:
    """Run the steps in turn; each linear ends with the mask, weights and notes of all of them.

    `joint`: statistics are those of the dense block. `sequential`: an input's are gathered anew, `batch` sequences at
    a time, once the linears that it comes through are pruned. Replicas share the work of linear steps, and end with
    the same bits, or with a NumericsError.
    """
    for steps, coming in _runs(recipe.steps):
        if isinstance(steps[0], BlockStep):
            made = _from_the_first(steps[0].prune(bench, sparsity, report), bench)
            _put(bench, steps[0], made.linears, sparsity)
            bench.tuned |= made.others
        else:
            linear_steps = [step for step in steps if isinstance(step, LinearStep)]
            _LinearSteps(linear_steps, coming, sparsity, bench).run(recipe.within_block, batch)
    if not recipe.steps:  # what is left of the block stays as it is
        return PrunedBlock(linears={}, others=bench.tuned, cut=bench.cut)
    kept_rows = [kept_in_rows(linear.keep_OD) for linear in bench.so_far.values()]
    bench.peers.agree(torch.cat(kept_rows), "how many weights each row keeps")
    return PrunedBlock(linears=bench.so_far, others=bench.tuned, cut=bench.cut)


def _runs(steps: Sequence[Step]) -> Iterator[tuple[list[Step], frozenset[type[Statistic]]]]:
    """Split a recipe into block steps and runs of linear steps, each with the statistics that later steps need."""
    position = 0
    for is_block_step, run in groupby(steps, key=lambda step: isinstance(step, BlockStep)):
        together = list(run)
        for part in [[step] for step in together] if is_block_step else [together]:
            position += len(part)
            yield part, frozenset(kind for step in steps[position:] for kind in step.statistics)


def _from_the_first(made: PrunedBlock, bench: Workbench) -> PrunedBlock:
    """Give every replica what the first one has learnt: the others' differ where their devices round differently."""
    peers = bench.peers
    if peers.size == 1:
        return made
    for value in made.others.values():
        peers.broadcast(value, 0)
    linears = {
        name: spread(linear if peers.rank == 0 else None, bench.weights[name], peers, 0)
        for name, linear in made.linears.items()
    }
    return PrunedBlock(linears=linears, others=made.others)


def _put(bench: Workbench, step: Step, results: dict[str, PrunedLinear], sparsity: Sparsity) -> None:
    """Lay what a step has made over what the steps before have; notes go by the step's name."""
    step_name = type(step).__name__.lower()
    for name, result in results.items():
        before = bench.so_far.get(name)
        bench.so_far[name] = PrunedLinear(
            keep_OD=result.keep_OD,
            weight_OD=result.weight_OD if result.weight_OD is not None or before is None else before.weight_OD,
            notes={
                **(before.notes if before else {}),
                **{f"{step_name}.{note}": value for note, value in result.notes.items()},
            },
            sparsity=result.sparsity or (before.sparsity if before else None) or sparsity,
        )


class _LinearSteps:
    """Linear steps that follow each other, and the linears they prune, input by input."""

    def __init__(
        self, steps: Sequence[LinearStep], coming: frozenset[type[Statistic]], sparsity: Sparsity, bench: Workbench
    ) -> None:
        self._steps, self._coming, self._sparsity, self._bench = steps, coming, sparsity, bench
        groups, size = bench.groups(), bench.peers.size
        owners = share_out([sum(_effort(bench.weights[n.name]) for n in group) for group in groups], size)
        self._owned = list(zip(groups, owners, strict=True))

    @torch.no_grad()
    def run(self, within_block: WithinBlock, batch: int) -> None:
        """Prune all linears: step by step, or input by input where what one makes is another's input."""
        if within_block == "joint":
            for position, step in enumerate(self._steps):
                self._prune(step, position, self._owned)
            return
        for number, (group, owner) in enumerate(self._owned):
            if number > 0 or self._bench.so_far:
                self._gather_again(group, batch)
            for position, step in enumerate(self._steps):
                self._prune(step, position, [(group, owner)])

    def _gather_again(self, group: Sequence[Linear], batch: int) -> None:
        """Replace the statistics of an input by those of the block as it is by now."""
        gathered = self._bench.gathered(group[0].name)
        kinds = [type(statistic) for statistic in gathered]
        if not kinds:
            return
        _drop(gathered, kinds)
        gathered.take(self._bench.collect_again(group, kinds, batch))

    def _prune(self, step: LinearStep, position: int, owned: Sequence[tuple[list[Linear], int]]) -> None:
        """Prune linears by one step; statistics are dropped when they have been used for the last time."""
        peers, by_rows = self._bench.peers, step.rows_alone(self._sparsity)
        needed_later = self._coming.union(*(later.statistics for later in self._steps[position + 1 :]))
        over = [kind for kind in step.statistics if kind not in needed_later]
        results: dict[str, PrunedLinear] = {}
        for group, owner in owned:
            if by_rows or owner == peers.rank:
                results |= self._solve(step, group, over)
            else:
                _drop(self._bench.gathered(group[0].name), over)
        if not by_rows:  # all replicas have solved what they own before any waits for another's
            results = {
                linear.name: spread(results.get(linear.name), self._bench.weights[linear.name], peers, owner)
                for group, owner in owned
                for linear in group
            }
        _put(self._bench, step, results, self._sparsity)

    def _solve(
        self, step: LinearStep, group: Sequence[Linear], over: Sequence[type[Statistic]]
    ) -> dict[str, PrunedLinear]:
        """Prune the linears of one input."""
        gathered = self._bench.gathered(group[0].name)
        solve = step.solver(gathered.holding(step.statistics))
        _drop(gathered, over)
        results: dict[str, PrunedLinear] = {}
        for linear in group:
            view = self._view(linear)
            if step.rows_alone(self._sparsity):
                results[linear.name] = solve_rows(solve, view, self._bench.peers)
            else:
                results[linear.name] = solve(view)
        return results

    def _view(self, linear: Linear) -> LinearView:
        before, dense_OD = self._bench.so_far.get(linear.name), self._bench.weights[linear.name]
        if before is None:
            return LinearView(dense_OD=dense_OD, sparsity=self._sparsity)
        return LinearView(
            dense_OD=dense_OD,
            sparsity=before.sparsity or self._sparsity,
            keep_OD=before.keep_OD,
            updated_OD=before.weight_OD,
        )


def _drop(gathered: Gathered, kinds: Sequence[type[Statistic]]) -> None:
    for kind in kinds:
        gathered.drop(kind)


def _effort(weight_OD: torch.Tensor) -> float:
    """Judge the work of solving one linear: rows times columns squared, as a factorisation and its updates take."""
    num_rows, num_columns = weight_OD.shape
    return float(num_rows + num_columns) * num_columns**2
