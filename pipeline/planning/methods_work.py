"""What each method takes to prune a block, counted from shapes alone."""

from collections.abc import Callable

from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.besa import Besa
from pipeline.methods.dsnot import Dsnot
from pipeline.methods.gradual import NUM_STAGES
from pipeline.methods.least_squares import FittingStep
from pipeline.methods.reconstruct import Reconstruct
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import BlockStep, Step
from pipeline.methods.structured.narrowing import Comp, Narrowing, WandaSp
from pipeline.methods.structured.published import Flap, TwoSsp
from pipeline.methods.structured.recovery import DAMPINGS
from pipeline.planning.work import Count, Linears, Pruning, Workload, weights_of
from pipeline.recipe import Recipe

SELECTION_TRAFFIC = 80
"""Bytes of memory traffic per weight of choosing the smallest of each row: scores, and the passes of a sort."""

MASK_STEP_TRAFFIC = 18
"""Bytes of memory traffic per weight and update of BESA: 16-bit ranks, the masked weight, its gradient."""

SWAP_TRAFFIC = 16
"""Bytes of memory traffic per weight and swap of its row: gradient, row of the Gram matrix, gain."""

GRID_STEP_TRAFFIC = 160
"""More of it where weights are put on grids: their levels are found four times over."""

LEARNING_STEP_TRAFFIC = 48
"""Bytes of memory traffic per weight and update of reconstruct: value, gradient and moments in float32, both ways."""


def made_bytes(recipe: Recipe, num_steps: int, num_weights: int, itemsize: int) -> int:
    """Return the bytes of the masks, and of the new weights, that the first steps of a recipe have made of a block."""
    steps = [step for step in recipe.at_work[:num_steps] if step is not recipe.narrowing]
    rewritten = any(step.rewrites or step.quantises for step in steps)
    return (num_weights if steps else 0) + (num_weights * itemsize if rewritten else 0)


def count_recipe(work: Workload, recipe: Recipe) -> list[Pruning]:
    """Count the steps of a recipe in turn: what comes after neurons are gone sees a smaller block."""
    return [count_prune(work if step is recipe.narrowing else work.cut, step) for step in recipe.at_work]


def count_prune(work: Workload, step: Step) -> Pruning:
    """Count one step of a recipe. A method that has no count of its own takes a selection among all weights."""
    return _PRUNING.get(type(step), _selection)(work, step)


def _selection(work: Workload, step: Step) -> Pruning:
    """Replicas share the rows of each linear, and send each other the masks, a byte a weight."""
    return Pruning(shared=Count(memory=SELECTION_TRAFFIC * work.num_weights), solved_bytes=work.num_weights)


def _dsnot(work: Workload, step: Step) -> Pruning:
    """Every swap of every row looks at all its weights again, a few numbers of each."""
    assert isinstance(step, Dsnot)
    by_error, guarded = step.criterion == "error", step.guard != "none"
    each = SELECTION_TRAFFIC + step.cycles * (SWAP_TRAFFIC if by_error else 0)
    products = 4 if by_error else 3 if guarded else 0  # with the Gram matrix: to begin with, and to judge by
    return Pruning(
        pieces=tuple(
            Count(memory=each * weights_of(group), gram=2.0 * products * weights_of(group) * group[0][1])
            for group in work.groups
        ),
        solved_bytes=(1 + work.dtype_bytes) * work.num_weights,
    )


def _by_input(work: Workload, step: Step) -> Pruning:
    """Replicas share the linears by input, and send each other masks and weights."""
    return Pruning(
        pieces=tuple(_solve(step, group) for group in work.groups),
        solved_bytes=(1 + work.dtype_bytes) * work.num_weights,
    )


def _solve(step: Step, group: Linears) -> Count:
    """Factorise and invert for the linears of an input; then sweep their columns, or multiply them again and again."""
    width = group[0][1]
    factor, product = 4 / 3 * width**3, 2.0 * weights_of(group) * width
    if isinstance(step, FittingStep):
        return Count(factor=factor * step.num_inverses(len(group)), gram=product * step.num_products)
    return Count(factor=factor, gram=product / 2, columns=len(group) * width)


def _learning(work: Workload, step: BlockStep, step_traffic: int) -> Count:
    """Forward and backward take three passes an epoch, and read inputs and what they are to become."""
    return Count(
        gemm=3 * step.epochs * work.forward_flops,
        memory=_num_updates(work, step) * step_traffic * work.num_weights,
        hidden_read=2 * step.epochs * work.boundary_bytes,
    )


def _num_updates(work: Workload, step: BlockStep) -> int:
    return step.epochs * -(-work.num_sequences // step.batch)


def _besa(work: Workload, step: Step) -> Pruning:
    """Every replica ranks all weights; trials of a mix of patterns are a pass each."""
    assert isinstance(step, Besa)
    trials = Count(gemm=step.num_trials * work.forward_flops, hidden_read=2 * step.num_trials * work.boundary_bytes)
    step_traffic = MASK_STEP_TRAFFIC + (GRID_STEP_TRAFFIC if step.quantises else 0)
    return Pruning(
        shared=_learning(work, step, step_traffic) + trials,
        repeated=Count(memory=SELECTION_TRAFFIC * work.num_weights),
        gradient_bytes=4 * step.num_parameters([shape for group in work.groups for shape in group]),
        num_updates=_num_updates(work, step),
    )


def _reconstruct(work: Workload, step: Step) -> Pruning:
    """Replicas sum the gradients of all weights in every update."""
    assert isinstance(step, Reconstruct)
    num_choices = NUM_STAGES if step.gradual else 0
    return Pruning(
        shared=_learning(work, step, LEARNING_STEP_TRAFFIC),
        repeated=Count(memory=num_choices * SELECTION_TRAFFIC * work.num_weights),
        gradient_bytes=4 * work.num_weights,
        num_updates=_num_updates(work, step),
    )


def _narrowing(work: Workload, step: Step) -> Pruning:
    """Every replica chooses and mends; they share the runs of the block that recoveries are judged by."""
    assert isinstance(step, Narrowing)
    if work.left is None:
        return Pruning()  # whole blocks are all that goes
    matrices = _units(step, work.groups[-1][-1][0], work.num_neurons, work.cut.num_neurons)
    if step.heads:
        matrices += _units(step, work.groups[1][-1][0], work.num_head_features, work.cut.num_head_features, few=True)
    num_judged = (work.num_sequences - step.num_fitted(work.num_sequences)) * (2 if step.heads else 1)
    runs = (1 + step.num_recoveries) * num_judged / work.num_sequences if step.needs_targets else 0.0
    judged = Count(gemm=runs * work.forward_flops, hidden_read=round(2 * runs * work.boundary_bytes))
    return Pruning(shared=judged, repeated=matrices)


def _units(step: Narrowing, num_rows: int, num_features: int, num_kept: int, *, few: bool = False) -> Count:
    """Count the choice among units (of some features, so many of which stay) that as many rows read, and its mending.

    `selection` tells what its rounds take; a mask or a solution for each damping takes a matrix of the pairs of those
    that stay, and its factor. few: there are so few of them (heads) that what takes pairs of units takes nothing.
    """
    num_units, left, num_gone = (0, 0, 0) if few else (num_features, num_kept, num_features - num_kept)
    found = Count()
    if step.neuron_metric in ("condition", "kappa"):
        products = 2.0 * num_rows * num_features**2 + 2.0 * num_units**2 * num_gone
        found += Count(double=products, double_factor=4 / 3 * num_units**3)
    if step.recovery == "mask":
        each = 2.0 * num_rows * (num_features**2 + num_kept**2)
        found += Count(double=each, double_factor=left**3 / 3).times(len(DAMPINGS))
    if step.recovery == "lstsq":
        each = 2.0 * num_rows * num_kept * num_features
        found += Count(double=each, double_factor=num_kept**3 / 3).times(len(DAMPINGS))
    return found


_PRUNING: dict[type[Step], Callable[[Workload, Step], Pruning]] = {
    SparseGPT: _by_input,
    Admm: _by_input,
    Alps: _by_input,
    Besa: _besa,
    Dsnot: _dsnot,
    Reconstruct: _reconstruct,
    Comp: _narrowing,
    WandaSp: _narrowing,
    Flap: _narrowing,
    TwoSsp: _narrowing,
}
