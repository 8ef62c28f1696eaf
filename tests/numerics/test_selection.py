"""Which units go: the closed form against removing and tuning by brute force, and down-dating against refactoring."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.selection import Rounds, Selection, keep_without_lowest, select
from tests import removal
from tests.correlated import DEAD, distance, inputs, normal, with_dead_features

BARELY = 1e-13
"""A damping that is felt by no digit that counts."""

NO_BOUND = float("inf")


def problem_of(weight_OD: torch.Tensor, x_TD: torch.Tensor, unit_size: int = 1) -> MaskProblem:
    return MaskProblem(weight_OD=weight_OD, gram_DD=x_TD.double().T @ x_TD.double(), unit_size=unit_size)


def gone(selection: Selection) -> set[int]:
    return set((~selection.keep_U).nonzero()[:, 0].tolist())


def counts(num_pruned: int, num_rounds: int) -> list[int]:
    targets = [num_pruned * number // num_rounds for number in range(num_rounds + 1)]
    return [after - before for before, after in pairwise(targets)]


def test_the_condition_metric_is_what_removing_a_unit_and_tuning_the_rest_costs() -> None:
    weight_OD, x_TD = normal(7, 20), inputs(20, 60)
    brute_U = removal.rises(removal.carried(weight_OD, x_TD))
    inverse_UU, _ = problem_of(weight_OD, x_TD).inverse(BARELY)
    assert ((1 / inverse_UU.diagonal()) / brute_U - 1).abs().max() < 1e-8


def test_so_it_is_with_the_ridge_and_for_heads() -> None:
    weight_OD, x_TD = normal(7, 24), inputs(24, 60)
    a_NU, problem = removal.carried(weight_OD, x_TD, 3), problem_of(weight_OD, x_TD, 3)
    inverse_UU, used = problem.inverse(0.05)
    brute_U = removal.rises(a_NU, ridge=problem.ridge(used))
    assert ((1 / inverse_UU.diagonal()) / brute_U - 1).abs().max() < 1e-8


@pytest.mark.parametrize(("num_pruned", "num_rounds"), [(1, 1), (9, 9), (9, 4), (9, 1), (5, 16)])
def test_units_go_in_the_order_that_brute_force_finds_anew_each_round(num_pruned: int, num_rounds: int) -> None:
    weight_OD, x_TD = normal(7, 20, seed=4), inputs(20, 60)
    a_NU, problem = removal.carried(weight_OD, x_TD), problem_of(weight_OD, x_TD)
    ridge = problem.ridge(0.01)
    selection = select(problem, num_pruned, Rounds(num_rounds=num_rounds, mask_var_max=NO_BOUND))
    expected = removal.removed_in_rounds(a_NU, counts(num_pruned, num_rounds), ridge)
    assert gone(selection) == set(expected)
    assert selection.num_unmet == 0
    assert distance(selection.mask_U, removal.best_mask(a_NU, expected, ridge)) < 1e-8
    assert selection.rise == pytest.approx(removal.least_error(a_NU, expected, ridge), rel=1e-8)


def test_rounds_keep_one_of_two_that_say_the_same_where_one_shot_drops_both() -> None:
    weight_OD, x_TD = normal(7, 12), normal(60, 12, seed=1)
    weight_OD[:, 5], x_TD[:, 5] = weight_OD[:, 2], x_TD[:, 2]
    problem = problem_of(weight_OD, x_TD)
    one_shot, rounds = (select(problem, 2, Rounds(num_rounds=n, mask_var_max=NO_BOUND)) for n in (1, 2))
    assert gone(one_shot) == {2, 5}
    assert len(gone(rounds) & {2, 5}) == 1
    assert rounds.rise < one_shot.rise


def test_a_unit_that_speaks_for_two_is_worth_four_times_its_own_size() -> None:
    x_TD = torch.eye(4)[:, [0, 0, 1, 2]]  # what units 0 and 1 carry is the same, and the rest has nothing in common
    weight_OD = torch.eye(3)[:, [0, 0, 1, 2]] * torch.tensor([1.0, 1.0, 2.0, 3.0]).sqrt()
    selection = select(problem_of(weight_OD, x_TD), 2, Rounds(num_rounds=2, damping=1e-6, mask_var_max=NO_BOUND))
    assert gone(selection) in ({0, 2}, {1, 2})
    assert selection.rise == pytest.approx(2, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    num_units=st.integers(3, 24),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 999),
    share=st.floats(0, 0.9),
    num_rounds=st.integers(1, 16),
    damping=st.sampled_from([1e-3, 0.01, 0.5]),
)
def test_down_dating_ends_where_factorising_anew_does(
    num_units: int, num_tokens: int, seed: int, share: float, num_rounds: int, damping: float
) -> None:
    weight_OD, x_TD = normal(4, num_units, seed=seed), normal(num_tokens, num_units, seed=seed + 1)
    problem = problem_of(weight_OD, x_TD)
    num_pruned = min(int(share * num_units), num_units - 1)
    selection = select(problem, num_pruned, Rounds(num_rounds=num_rounds, damping=damping, mask_var_max=NO_BOUND))
    keep_U = selection.keep_U
    damped_UU = problem.coupling()
    damped_UU.diagonal().add_(problem.ridge(damping))
    expected_K = 1 + torch.linalg.solve(damped_UU[keep_U][:, keep_U], damped_UU[keep_U][:, ~keep_U].sum(dim=1))
    assert len(keep_U) - keep_U.count_nonzero() == num_pruned
    assert selection.mask_U[~keep_U].abs().sum() == 0
    assert (selection.mask_U[keep_U] - expected_K).abs().max() < 1e-8
    missing_U = selection.mask_U - 1
    assert selection.rise == pytest.approx((missing_U @ damped_UU @ missing_U).item(), rel=1e-7, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), exponent=st.integers(-20, 20), num_pruned=st.integers(0, 11))
def test_the_scale_of_the_inputs_changes_nothing_and_more_cost_more(seed: int, exponent: int, num_pruned: int) -> None:
    weight_OD, x_TD = normal(4, 12, seed=seed), normal(30, 12, seed=seed + 1).double()
    how = Rounds(num_rounds=4, mask_var_max=NO_BOUND)
    selection = select(problem_of(weight_OD, x_TD), num_pruned, how)
    scaled = select(problem_of(weight_OD, x_TD * 2.0**exponent), num_pruned, how)
    assert torch.equal(selection.keep_U, scaled.keep_U)
    assert torch.equal(selection.mask_U, scaled.mask_U)
    assert select(problem_of(weight_OD, x_TD), min(num_pruned + 1, 11), Rounds(num_rounds=1)).rise >= 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_order_of_the_units_changes_nothing(seed: int) -> None:
    weight_OD, x_TD = normal(4, 12, seed=seed), normal(30, 12, seed=seed + 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    how = Rounds(num_rounds=3, mask_var_max=NO_BOUND)
    selection = select(problem_of(weight_OD, x_TD), 5, how)
    permuted = select(problem_of(weight_OD[:, order], x_TD[:, order]), 5, how)
    assert torch.equal(permuted.keep_U, selection.keep_U[order])


def test_one_of_two_that_say_the_same_goes_and_the_other_speaks_for_both() -> None:
    weight_OD, x_TD = normal(7, 12), inputs(12, 60)
    weight_OD[:, 5], x_TD[:, 5] = weight_OD[:, 2], x_TD[:, 2]
    selection = select(problem_of(weight_OD, x_TD), 1, Rounds(damping=1e-9, mask_var_max=NO_BOUND))
    assert len(gone(selection) & {2, 5}) == 1
    assert selection.mask_U[[2, 5]].max() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("metric", ["condition", "forward"])
def test_units_that_carry_nothing_go_first(metric: str) -> None:
    weight_OD, x_TD = normal(7, 20), with_dead_features(inputs(20, 60))
    selection = select(problem_of(weight_OD, x_TD), len(DEAD), Rounds(metric=metric))  # type: ignore[arg-type]
    assert gone(selection) == set(DEAD)
    assert torch.equal(selection.mask_U, selection.keep_U.double())


def test_forward_goes_by_what_a_unit_carries_alone() -> None:
    weight_OD, x_TD = normal(7, 20), inputs(20, 60)
    size_U = weight_OD.norm(dim=0) * x_TD.norm(dim=0)
    selection = select(problem_of(weight_OD, x_TD), 6, Rounds(metric="forward"))
    assert gone(selection) == set(size_U.argsort()[:6].tolist())
    assert torch.equal(selection.mask_U, selection.keep_U.double())


def test_kappa_goes_by_how_well_others_span_a_unit() -> None:
    weight_OD, x_TD = normal(7, 20), inputs(20, 60)
    problem = problem_of(weight_OD, x_TD)
    damped_UU = problem.coupling()
    damped_UU.diagonal().add_(problem.ridge(0.01))
    others = [[other for other in range(20) if other != unit] for unit in range(20)]
    # 1 / kappa^2 is the part of a unit, with its ridge, that the others leave unexplained.
    spanned = [
        1 - damped_UU[u, o] @ torch.linalg.solve(damped_UU[o][:, o], damped_UU[o, u]) / damped_UU[u, u]
        for u, o in enumerate(others)
    ]
    selection = select(problem, 6, Rounds(metric="kappa", num_rounds=1, mask_var_max=NO_BOUND))
    assert gone(selection) == set(torch.stack(spanned).argsort()[:6].tolist())
    assert selection.notes["kappa_max"] == pytest.approx((1 / torch.stack(spanned).min()).sqrt().item(), rel=1e-8)


def test_kappa_does_not_see_size() -> None:
    weight_OD, x_TD = normal(7, 20), inputs(20, 60)
    how = Rounds(metric="kappa", num_rounds=1, damping=1e-10, mask_var_max=NO_BOUND)
    larger_OD = weight_OD * torch.logspace(-1, 1, 20).flip(0)
    assert gone(select(problem_of(larger_OD, x_TD), 6, how)) == gone(select(problem_of(weight_OD, x_TD), 6, how))


def test_a_round_that_makes_the_mask_stray_is_undone_and_what_is_unmet_is_told() -> None:
    problem = problem_of(normal(7, 20, seed=4), inputs(20, 60))
    free = select(problem, 12, Rounds(num_rounds=6, mask_var_max=NO_BOUND))
    bound = free.notes["mask_variance"] / 2
    stopped = select(problem, 12, Rounds(num_rounds=6, mask_var_max=bound))
    assert 0 < stopped.num_unmet < 12
    assert stopped.num_unmet % 2 == 0
    assert stopped.notes["mask_variance"] <= bound
    num_gone = 12 - stopped.num_unmet
    as_far = select(problem, num_gone, Rounds(num_rounds=num_gone // 2, mask_var_max=NO_BOUND))
    assert torch.equal(stopped.mask_U, as_far.mask_U)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.3, 0.5])
def test_or_the_mask_stays_from_then_on_while_all_go_that_were_to_go(part: float) -> None:
    problem = problem_of(normal(7, 40, seed=4), inputs(40, 60))
    bound = part * select(problem, 24, Rounds(num_rounds=12, mask_var_max=NO_BOUND)).notes["mask_variance"]
    stopped = select(problem, 24, Rounds(num_rounds=12, mask_var_max=bound))
    frozen = select(problem, 24, Rounds(num_rounds=12, mask_var_max=bound, at_bound="freeze"))
    assert stopped.num_unmet > frozen.num_unmet == 0
    assert len(gone(frozen)) == 24
    assert gone(stopped) < gone(frozen)
    assert torch.equal(frozen.mask_U, stopped.mask_U * frozen.keep_U)


def test_a_bound_of_nothing_lets_nothing_go() -> None:
    problem = problem_of(normal(7, 20), inputs(20, 60))
    selection = select(problem, 5, Rounds(mask_var_max=0.0))
    assert selection.keep_U.all()
    assert selection.num_unmet == 5
    assert torch.equal(selection.mask_U, torch.ones(20, dtype=torch.float64))


def test_every_pool_loses_as_many() -> None:
    problem = problem_of(normal(7, 24), inputs(24, 60), unit_size=2)
    selection = select(problem, 2, Rounds(num_rounds=2, mask_var_max=NO_BOUND), num_pools=3)
    assert selection.keep_U.view(3, 4).sum(dim=1).tolist() == [2, 2, 2]


def test_of_equal_scores_the_first_go() -> None:
    keep_U = keep_without_lowest(torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0]), 1, num_pools=2)
    assert keep_U.tolist() == [True, False, True, False, True, True]
