"""BESA's closed-form mask gradient against the naive formulation: time and memory, as ratios in one run."""

import sys
import time
from collections.abc import Callable

import pytest
import torch

from pipeline.methods.row_sparsity import MaskedWeight, candidate_sparsities, pruned_counts, shares, tilt_towards
from pipeline.sparsity import row_ranks

pytestmark = pytest.mark.bench

ROWS, COLUMNS, CANDIDATES = 1024, 4096, 101


def naive(share: torch.Tensor, weight: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The formulation of the paper: the probability map is materialised and left to autograd."""
    alpha = share @ candidate_sparsities(share.device)
    hard = (rank >= pruned_counts(alpha.detach(), COLUMNS)[:, None]).float()
    bounds = pruned_counts(candidate_sparsities(share.device), COLUMNS)
    drop = torch.zeros_like(weight)
    for i in range(CANDIDATES):
        drop = drop + share[:, i : i + 1] * (rank < bounds[i])
    soft = 1 - drop
    return weight * (hard + soft - soft.detach())


def closed(share: torch.Tensor, weight: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Ours."""
    counts = pruned_counts((share @ candidate_sparsities(share.device)).detach(), COLUMNS)
    return MaskedWeight.apply(share, weight, rank, counts)


def step(
    formulation: Callable[..., torch.Tensor], weight: torch.Tensor, rank: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """One forward and backward; returns the gradient of theta."""
    theta = torch.zeros(ROWS, CANDIDATES, requires_grad=True)
    share = shares(theta, tilt_towards(0.5, theta.device), 1.0)
    formulation(share, weight, rank).backward(grad)
    assert theta.grad is not None
    return theta.grad


def saved_bytes(formulation: Callable[..., torch.Tensor], weight: torch.Tensor, rank: torch.Tensor) -> int:
    """Bytes autograd keeps for the backward pass, beside the weight itself."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    share = torch.full((ROWS, CANDIDATES), 1 / CANDIDATES, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        formulation(share, weight, rank)
    kept.pop(weight.data_ptr(), None)
    return sum(kept.values())


def test_closed_form_gradient_is_the_naive_one_faster_and_smaller() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    rank = row_ranks(weight.abs())
    found, expected = step(closed, weight, rank, grad), step(naive, weight, rank.long(), grad)
    difference = ((found - expected).norm() / expected.norm()).item()
    seconds = {}
    for name, formulation, ranks in (("closed", closed, rank), ("naive", naive, rank.long())):
        start = time.perf_counter()
        step(formulation, weight, ranks, grad)
        seconds[name] = time.perf_counter() - start
    saved = {"closed": saved_bytes(closed, weight, rank), "naive": saved_bytes(naive, weight, rank.long())}
    sys.stdout.write(
        f"\nrelative difference {difference:.2e}; time: naive / closed = {seconds['naive'] / seconds['closed']:.1f}; "
        f"bytes kept for backward per weight: closed {saved['closed'] / weight.numel():.1f}, "
        f"naive {saved['naive'] / weight.numel():.1f}\n"
    )
    assert difference < 1e-5
    assert seconds["closed"] < seconds["naive"]
    assert saved["closed"] < saved["naive"] / 4
