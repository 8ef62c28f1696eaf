"""Masks mended by DSnoT, and what a plain loop makes of them, for tests."""

from typing import Literal

import pytest
import torch

from pipeline.methods.dsnot import AUTHORS_TOLERANCE, Dsnot
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import LinearStep, LinearView, PrunedLinear
from pipeline.methods.swaps import LEAST_GAIN
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import ColumnSquares, Gathered, Gram, Moments
from tests import reference

HALF, TWO_FOUR = Unstructured(ratio=0.5), SemiStructured(keep=2, group=4)
SPARSITIES = pytest.mark.parametrize("sparsity", [HALF, Unstructured(ratio=0.7), TWO_FOUR], ids=str)
Guard = Literal["row", "linear", "none"]
Criterion = Literal["mean", "error"]
CRITERIA = pytest.mark.parametrize("criterion", ["mean", "error"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_features: int, num_tokens: int = 300, seed: int = 1) -> torch.Tensor:
    """Tokens whose features differ in mean and scale, and are correlated, as those of language models are."""
    causes = normal(num_tokens, 3, seed=seed) @ normal(3, num_features, seed=seed + 1)
    own = causes + normal(num_tokens, num_features, seed=seed + 2)
    return (own + 2 * normal(num_features, seed=seed + 3)) * torch.logspace(-0.5, 0.5, num_features)


def gathered(x_TD: torch.Tensor) -> Gathered:
    statistics = [kind.empty(x_TD.shape[1], x_TD.device) for kind in (ColumnSquares, Moments, Gram)]
    for statistic in statistics:
        statistic.update(x_TD)
    return Gathered(statistics)


def first_step(step: LinearStep, weight_OD: torch.Tensor, x_TD: torch.Tensor, sparsity: Sparsity) -> PrunedLinear:
    return step.solver(gathered(x_TD))(LinearView(dense_OD=weight_OD, sparsity=sparsity))


def view_of(weight_OD: torch.Tensor, pruned: PrunedLinear, sparsity: Sparsity) -> LinearView:
    return LinearView(dense_OD=weight_OD, sparsity=sparsity, keep_OD=pruned.keep_OD, updated_OD=pruned.weight_OD)


def mend(
    view: LinearView, x_TD: torch.Tensor, guard: Guard = "none", criterion: Criterion = "mean", **options: float | bool
) -> PrunedLinear:
    step = Dsnot.model_validate({"guard": guard, "criterion": criterion, **options})
    return step.solver(gathered(x_TD).holding(step.statistics))(view)


def textbook(
    view: LinearView,
    x_TD: torch.Tensor,
    cycles: int = 50,
    tolerance: float = AUTHORS_TOLERANCE,
    overshoot: bool = False,
) -> torch.Tensor:
    assert view.keep_OD is not None
    group = view.sparsity.group if isinstance(view.sparsity, SemiStructured) else None
    rows = zip(view.dense_OD.tolist(), view.weight_OD.tolist(), view.keep_OD.tolist(), strict=True)
    options = {"cycles": cycles, "tolerance": tolerance, "overshoot": overshoot, "group": group}
    return torch.tensor([reference.dsnot_row(*row, x_TD, **options) for row in rows])


def tried(view: LinearView, x_TD: torch.Tensor, cycles: int) -> torch.Tensor:
    assert view.keep_OD is not None
    group = view.sparsity.group if isinstance(view.sparsity, SemiStructured) else view.keep_OD.shape[1]
    gram_DD, options = x_TD.double().T @ x_TD.double(), {"cycles": cycles, "least_gain": LEAST_GAIN, "group": group}
    rows = zip(view.dense_OD.tolist(), view.weight_OD.tolist(), view.keep_OD.tolist(), strict=True)
    return torch.tensor([reference.squared_error_row(*row, gram_DD, **options) for row in rows])


def row_errors(view: LinearView, pruned: PrunedLinear, x_TD: torch.Tensor) -> torch.Tensor:
    """Squared error of every row's output, float64."""
    weight_OD = view.dense_OD if pruned.weight_OD is None else pruned.weight_OD
    missing_OD = view.dense_OD.double() - weight_OD.double() * pruned.keep_OD
    return (x_TD.double() @ missing_OD.T).square().sum(dim=0)


def given_errors(view: LinearView, x_TD: torch.Tensor) -> torch.Tensor:
    assert view.keep_OD is not None
    return row_errors(view, PrunedLinear(keep_OD=view.keep_OD, weight_OD=view.updated_OD), x_TD)


FIRST = pytest.mark.parametrize(
    "first",
    [Wanda(), Magnitude(), Magnitude(scope="row"), SparseGPT()],
    ids=["wanda", "magnitude", "by row", "sparsegpt"],
)
