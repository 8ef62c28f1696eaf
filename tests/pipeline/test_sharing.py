"""Replicas share the solving of linears and end with the bits of one that does it all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import LinearStep, LinearView, PrunedLinear
from pipeline.methods.wanda import Wanda
from pipeline.peers import Alone
from pipeline.sharing import share_out, solve_rows, spread
from pipeline.sparsity import Sparsity, parse_sparsity
from pipeline.statistics import ColumnSquares, Gathered, Gram
from tests.replicas import ThreadPeer, together
from tests.solving import solve

HALF = parse_sparsity(0.5)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squares(num_columns: int) -> ColumnSquares:
    statistic = ColumnSquares.empty(num_columns, torch.device("cpu"))
    statistic.update(normal(50, num_columns, seed=1))
    return statistic


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(1, 4))
def test_every_piece_has_an_owner_and_no_owner_has_much_more_than_another(costs: list[float], owners: int) -> None:
    given_to = share_out(costs, owners)
    loads = [sum(cost for cost, owner in zip(costs, given_to, strict=True) if owner == o) for o in range(owners)]
    assert len(given_to) == len(costs)
    assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_costs_are_given_to_whoever_has_least() -> None:
    assert share_out([1, 5, 4, 2], 2) == [0, 0, 1, 1]


@pytest.mark.parametrize("sparsity", [HALF, parse_sparsity("2:4")], ids=str)
@pytest.mark.parametrize("step", [Wanda(), Magnitude(scope="row")], ids=["wanda", "magnitude"])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_rows_shared_out_are_pruned_as_by_one(step: LinearStep, sparsity: Sparsity, num_rows: int) -> None:
    weight_OD, solve = normal(num_rows, 16), step.solver(Gathered([squares(16)]))
    assert step.rows_alone(sparsity)
    view = LinearView(dense_OD=weight_OD, sparsity=sparsity)
    alone = solve_rows(solve, view, Alone())
    for result in together(3, lambda peer: solve_rows(solve, view, peer)):
        assert torch.equal(result.keep_OD, alone.keep_OD)


@pytest.mark.parametrize(
    ("step", "sparsity", "alone"),
    [
        (Magnitude(), HALF, False),
        (Magnitude(), parse_sparsity("2:4"), True),
        (SparseGPT(), parse_sparsity("2:4"), False),  # its factorisation would have to be done by everybody
    ],
)
def test_methods_say_whether_rows_are_alone(step: LinearStep, sparsity: Sparsity, alone: bool) -> None:
    assert step.rows_alone(sparsity) is alone


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_what_one_has_solved_reaches_all_with_its_weights_and_notes(owner: int) -> None:
    gram = Gram.empty(12, torch.device("cpu"))
    gram.update(normal(40, 12, seed=2))
    weight_OD = normal(5, 12)
    solved = solve(SparseGPT(), gram, weight_OD, HALF)

    def receive(peer: ThreadPeer) -> PrunedLinear:
        return spread(solved if peer.rank == owner else None, weight_OD, peer, owner)

    for result in together(3, receive):
        assert torch.equal(result.keep_OD, solved.keep_OD)
        assert solved.weight_OD is not None
        assert result.weight_OD is not None
        assert torch.equal(result.weight_OD, solved.weight_OD)
        assert result.notes == solved.notes


def test_a_mask_without_new_weights_stays_without() -> None:
    keep_OD = normal(3, 4) > 0
    received = together(2, lambda p: spread(PrunedLinear(keep_OD=keep_OD) if p.rank else None, normal(3, 4), p, 1))
    assert [result.weight_OD for result in received] == [None, None]
