"""Wanda against the paper's formula in float64, and the laws it keeps."""

import pytest
import torch

from pipeline import sparsity as slabs
from pipeline.methods.step import PrunedLinear
from pipeline.methods.wanda import Wanda, input_norms, wanda_scores
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import ColumnSquares
from tests import reference
from tests.solving import solve

HALF = Unstructured(ratio=0.5)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_features: int, seed: int = 0) -> torch.Tensor:
    """Tokens whose features differ in scale, so that norms matter."""
    return normal(60, num_features, seed=seed) * torch.logspace(-1, 1, num_features)


def prune(weight_OD: torch.Tensor, x_TD: torch.Tensor, sparsity: Sparsity) -> PrunedLinear:
    squares = ColumnSquares.empty(x_TD.shape[1], x_TD.device)
    squares.update(x_TD)
    return solve(Wanda(), squares, weight_OD, sparsity)


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (17, 33), (40, 100)])
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.7, 0.99])
def test_every_row_loses_its_lowest_weight_times_norm(shape: tuple[int, int], ratio: float) -> None:
    weight_OD, x_TD = normal(*shape, seed=1), inputs(shape[1])
    num_pruned = round(100 * ratio) * shape[1] // 100
    keep_OD = prune(weight_OD, x_TD, Unstructured(ratio=ratio)).keep_OD
    assert torch.equal(keep_OD, reference.keep_in_rows(reference.wanda_scores(weight_OD, x_TD), num_pruned))


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 7)])
def test_every_group_keeps_its_highest_weight_times_norm(keep: int, group: int) -> None:
    weight_OD, x_TD = normal(9, 4 * group, seed=2), inputs(4 * group)
    keep_OD = prune(weight_OD, x_TD, SemiStructured(keep=keep, group=group)).keep_OD
    assert torch.equal(keep_OD, reference.keep_in_groups(reference.wanda_scores(weight_OD, x_TD), keep, group))
    assert (keep_OD.reshape(-1, group).sum(dim=1) == keep).all()


def test_the_norm_outweighs_the_weight() -> None:
    """The paper's point: a small weight on a loud input matters more than a large one on a quiet input."""
    weight_OD, x_TD = torch.tensor([[1.0, 2.0]]), torch.tensor([[30.0, 1.0], [40.0, 0.0]])
    assert prune(weight_OD, x_TD, HALF).keep_OD.tolist() == [[True, False]]


def test_scores_and_norms_are_the_papers() -> None:
    weight_OD, x_TD = normal(5, 20, seed=3), inputs(20)
    squares = ColumnSquares.empty(20, x_TD.device)
    squares.update(x_TD)
    scores = wanda_scores(weight_OD, input_norms(squares))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), reference.wanda_scores(weight_OD, x_TD), rtol=1e-6)


@pytest.mark.parametrize("sparsity", [HALF, SemiStructured(keep=2, group=4)])
def test_rows_do_not_see_each_other(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(12, 24, seed=4), inputs(24)
    weight_OD[3] *= 1e-3  # a faint row loses no more than the others
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    keep_OD = prune(weight_OD, x_TD, sparsity).keep_OD
    assert torch.equal(prune(weight_OD[order], x_TD, sparsity).keep_OD, keep_OD[order])
    assert torch.equal(prune(weight_OD[3:4], x_TD, sparsity).keep_OD, keep_OD[3:4])


@pytest.mark.parametrize("scale", [1e-4, 0.3, 7.0, 1e4])
def test_the_scale_of_the_activations_does_not_matter(scale: float) -> None:
    weight_OD, x_TD = normal(12, 24, seed=6), inputs(24)
    keep_OD = prune(weight_OD, x_TD, HALF).keep_OD
    assert torch.equal(prune(weight_OD, scale * x_TD, HALF).keep_OD, keep_OD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_are_the_dense_ones(dtype: torch.dtype) -> None:
    weight_OD = normal(12, 24, seed=7).to(dtype)
    before = weight_OD.clone()
    pruned = prune(weight_OD, inputs(24), HALF)
    assert pruned.weight_OD is None
    assert torch.equal(weight_OD, before)


@pytest.mark.parametrize("sparsity", [HALF, SemiStructured(keep=2, group=4)])
def test_neither_slabs_nor_a_transposed_storage_change_the_mask(
    sparsity: Sparsity, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OD, x_TD = normal(12, 24, seed=10), inputs(24)
    keep_OD = prune(weight_OD, x_TD, sparsity).keep_OD
    assert torch.equal(prune(weight_OD.T.contiguous().T, x_TD, sparsity).keep_OD, keep_OD)
    monkeypatch.setattr(slabs, "SLAB_NUMEL", 5 * 24 + 1)
    assert torch.equal(prune(weight_OD, x_TD, sparsity).keep_OD, keep_OD)


def test_a_pruned_matrix_prunes_to_itself() -> None:
    weight_OD, x_TD = normal(12, 24, seed=8), inputs(24)
    keep_OD = prune(weight_OD, x_TD, HALF).keep_OD
    assert torch.equal(prune(weight_OD * keep_OD, x_TD, HALF).keep_OD, keep_OD)


def test_dead_features_go_first() -> None:
    weight_OD, x_TD = normal(12, 24, seed=9), inputs(24)
    dead = torch.tensor([2, 11, 17])
    weight_OD[:, dead] = 1e3
    x_TD[:, dead] = 0
    kept_D = prune(weight_OD, x_TD, Unstructured(ratio=0.125)).keep_OD.all(dim=0)
    assert kept_D.logical_not().nonzero().flatten().tolist() == dead.tolist()
