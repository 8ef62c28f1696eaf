"""Magnitude pruning against a stable sort of |W|, and the laws it keeps."""

from typing import Literal

import pytest
import torch

from pipeline.methods.magnitude import Magnitude
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from tests import reference
from tests.solving import solve

Scope = Literal["matrix", "row"]
SCOPES = pytest.mark.parametrize("scope", ["matrix", "row"])


def weights(num_rows: int, num_columns: int) -> torch.Tensor:
    """Weights whose rows differ in scale, so that it matters where they compete."""
    weight_OD = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
    return weight_OD * torch.logspace(-1, 1, num_rows)[:, None]


def prune(weight_OD: torch.Tensor, sparsity: Sparsity, scope: Scope = "matrix") -> torch.Tensor:
    pruned = solve(Magnitude(scope=scope), [], weight_OD, sparsity)
    assert pruned.weight_OD is None
    return pruned.keep_OD


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (20, 33)])
@pytest.mark.parametrize("percent", [0, 29, 50, 70, 99])
def test_the_matrix_loses_its_smallest(shape: tuple[int, int], percent: int) -> None:
    weight_OD = weights(*shape)
    expected = reference.keep_in_matrix(weight_OD.double().abs(), percent * weight_OD.numel() // 100)
    assert torch.equal(prune(weight_OD, Unstructured(ratio=percent / 100)), expected)


@pytest.mark.parametrize("percent", [0, 29, 50, 70, 99])
def test_every_row_loses_its_smallest(percent: int) -> None:
    weight_OD = weights(7, 30)
    expected = reference.keep_in_rows(weight_OD.double().abs(), percent * 30 // 100)
    assert torch.equal(prune(weight_OD, Unstructured(ratio=percent / 100), "row"), expected)


@SCOPES
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 7)])
def test_patterns_compete_within_their_group_in_either_scope(scope: Scope, keep: int, group: int) -> None:
    weight_OD = weights(6, 3 * group)
    expected = reference.keep_in_groups(weight_OD.double().abs(), keep, group)
    assert torch.equal(prune(weight_OD, SemiStructured(keep=keep, group=group), scope), expected)


@SCOPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_coarse_weights_still_give_the_exact_count(scope: Scope, dtype: torch.dtype) -> None:
    """A threshold would drop all of the equal weights with the first."""
    weight_OD = (weights(16, 32).clamp(-1, 1) * 4).round().div(4).to(dtype)
    assert len(set(weight_OD.flatten().tolist())) < 10
    keep_OD = prune(weight_OD, Unstructured(ratio=0.5), scope)
    assert (~keep_OD).sum().item() == 16 * 32 // 2


@SCOPES
@pytest.mark.parametrize("sparsity", [Unstructured(ratio=0.7), SemiStructured(keep=2, group=4)])
def test_a_pruned_matrix_prunes_to_itself(scope: Scope, sparsity: Sparsity) -> None:
    weight_OD = weights(8, 20)
    keep_OD = prune(weight_OD, sparsity, scope)
    assert torch.equal(prune(weight_OD * keep_OD, sparsity, scope), keep_OD)


def test_rows_compete_in_the_matrix_and_not_in_the_row() -> None:
    weight_OD = torch.tensor([[1.0, 2.0], [-30.0, 40.0]])
    assert prune(weight_OD, Unstructured(ratio=0.5)).tolist() == [[False, False], [True, True]]
    assert prune(weight_OD, Unstructured(ratio=0.5), "row").tolist() == [[False, True], [False, True]]


@SCOPES
@pytest.mark.parametrize("sparsity", [Unstructured(ratio=0.7), SemiStructured(keep=2, group=4)])
def test_a_weight_stored_transposed_gives_the_same(scope: Scope, sparsity: Sparsity) -> None:
    weight_OD = weights(8, 20)
    stored_DO = weight_OD.T.contiguous()
    assert torch.equal(prune(stored_DO.T, sparsity, scope), prune(weight_OD, sparsity, scope))


@SCOPES
def test_weights_are_left_as_they_were(scope: Scope) -> None:
    weight_OD = weights(8, 20)
    before = weight_OD.clone()
    prune(weight_OD, Unstructured(ratio=0.5), scope)
    assert torch.equal(weight_OD, before)
