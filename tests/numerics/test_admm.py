"""ADMM against its three variables written out in float64, and the laws of what it makes."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods import admm
from pipeline.methods.admm import Admm, grown_mask
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import PrunedLinear
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import Gram
from tests import reference
from tests.correlated import DEAD, distance, gram_of, inputs, normal, squares_of, with_dead_features
from tests.solving import solve

HALF = Unstructured(ratio=0.5)
FOUR_OF_EIGHT = SemiStructured(keep=4, group=8)
SPARSITIES = [HALF, Unstructured(ratio=0.7), SemiStructured(keep=2, group=4), FOUR_OF_EIGHT]


def prune(
    step: Admm, weight_OD: torch.Tensor, gram: Gram, sparsity: Sparsity, keep_OD: torch.Tensor | None = None
) -> tuple[torch.Tensor, PrunedLinear]:
    pruned = solve(step, gram, weight_OD, sparsity, keep_OD)
    assert pruned.weight_OD is not None
    assert not pruned.weight_OD[~pruned.keep_OD].any()
    return pruned.weight_OD, pruned


def cubic(num_pruned: int, step: int, num_steps: int) -> int:
    """As many as 1 - (1 - t)^3 of what goes in the end."""
    return int(num_pruned * (1 - (1 - (step + 1) / num_steps) ** 3))


Masker = Callable[[torch.Tensor, int, int], torch.Tensor]


def by_row(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    return reference.keep_in_rows(score_OD, cubic(score_OD.shape[1] // 2, step, num_steps))


def by_matrix(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    return reference.keep_in_matrix(score_OD, cubic(score_OD.numel() // 2, step, num_steps))


def by_group(score_OD: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """The four highest of eight are safe; of the others, the lowest of the row go first."""
    safe_OD = reference.keep_in_groups(score_OD, 4, 8)
    guarded_OD = score_OD.masked_fill(safe_OD, torch.inf)
    return reference.keep_in_rows(guarded_OD, cubic(score_OD.shape[1] // 2, step, num_steps))


@pytest.mark.parametrize(
    ("scope", "sparsity", "masker"),
    [("row", HALF, by_row), ("matrix", HALF, by_matrix), ("row", FOUR_OF_EIGHT, by_group)],
)
def test_it_chooses_and_moves_as_the_paper_writes_it(scope: str, sparsity: Sparsity, masker: Masker) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = Admm.model_validate({"scope": scope, "choosing": 15, "refining": 0})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    expected_OD, keep_OD = reference.admm(
        weight_OD, gram.gram_DD, step.damping, lambda t, score_OD: masker(score_OD, t, 15), 15
    )
    assert torch.equal(pruned.keep_OD, keep_OD)
    assert distance(updated_OD, expected_OD) < 1e-4


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_what_it_keeps_is_the_least_squares_fit_on_its_mask(scope: str, sparsity: Sparsity) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = Admm.model_validate({"scope": scope, "refining": 60})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    hessian_DD = reference.power_hessian(gram.gram_DD, step.damping)
    assert distance(updated_OD, reference.fitted_rows(weight_OD, pruned.keep_OD, hessian_DD)) < 1e-4


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_correlated_inputs_let_it_err_less_than_sparsegpt_and_than_its_mask_alone(
    scope: str, sparsity: Sparsity
) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    updated_OD, pruned = prune(Admm.model_validate({"scope": scope}), weight_OD, gram_of(x_TD), sparsity)
    other = solve(SparseGPT(), gram_of(x_TD), weight_OD, sparsity)
    assert other.weight_OD is not None
    error = reference.output_error(weight_OD, updated_OD, x_TD)
    assert error < 0.5 * reference.output_error(weight_OD, weight_OD * pruned.keep_OD, x_TD)
    assert error < 0.7 * reference.output_error(weight_OD, other.weight_OD, x_TD)


def test_a_mask_that_grows_errs_less_than_one_chosen_at_once() -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    grown_OD, _ = prune(Admm(refining=60), weight_OD, gram_of(x_TD), HALF)
    at_once_OD, _ = prune(Admm(choosing=1, refining=60), weight_OD, gram_of(x_TD), HALF)
    error, worse = (reference.output_error(weight_OD, pruned_OD, x_TD) for pruned_OD in (grown_OD, at_once_OD))
    assert error < 0.9 * worse


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_mask_of_an_earlier_step_stays_and_its_weights_err_less(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    keep_OD = solve(Wanda(), squares_of(x_TD), weight_OD, sparsity).keep_OD
    updated_OD, pruned = prune(Admm(), weight_OD, gram_of(x_TD), sparsity, keep_OD)
    assert torch.equal(pruned.keep_OD, keep_OD)
    before = reference.output_error(weight_OD, weight_OD * keep_OD, x_TD)
    assert reference.output_error(weight_OD, updated_OD, x_TD) < 0.5 * before


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    percent=st.integers(0, 99),
    scope=st.sampled_from(["row", "matrix"]),
    choosing=st.integers(1, 6),
    num_tokens=st.integers(1, 60),
)
def test_counts_are_exact(shape: tuple[int, int], percent: int, scope: str, choosing: int, num_tokens: int) -> None:
    weight_OD, step = normal(*shape, seed=13), Admm.model_validate({"scope": scope, "choosing": choosing})
    _, pruned = prune(step, weight_OD, gram_of(inputs(shape[1], num_tokens)), Unstructured(ratio=percent / 100))
    units = pruned.keep_OD if scope == "row" else pruned.keep_OD.reshape(1, -1)
    assert ((~units).sum(dim=1) == percent * units.shape[1] // 100).all()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 7), (5, 8)])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_pattern_holds_in_every_group_and_is_no_other_pattern(keep: int, group: int, scope: str) -> None:
    step, weight_OD = Admm.model_validate({"scope": scope}), normal(10, 6 * group, seed=7)
    _, pruned = prune(step, weight_OD, gram_of(inputs(6 * group)), SemiStructured(keep=keep, group=group))
    assert (pruned.keep_OD.reshape(-1, group).sum(dim=1) == keep).all()


def test_four_of_eight_is_not_two_of_four() -> None:
    _, pruned = prune(Admm(), normal(10, 48, seed=7), gram_of(inputs(48)), FOUR_OF_EIGHT)
    assert not (pruned.keep_OD.reshape(-1, 4).sum(dim=1) == 2).all()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 15),
    sparsity=st.sampled_from(SPARSITIES),
    scope=st.sampled_from(["row", "matrix"]),
    seed=st.integers(0, 99),
)
def test_a_mask_grows_from_share_to_share_up_to_the_whole(
    steps: int, sparsity: Sparsity, scope: str, seed: int
) -> None:
    score_OD = normal(6, 24, seed=seed).abs()
    masks = [grown_mask(score_OD.clone(), sparsity, step / steps, scope) for step in range(steps + 1)]
    assert masks[0].all()
    assert all((larger <= smaller).all() for smaller, larger in pairwise(masks))
    by_hand = solve(Wanda(), squares_of(torch.ones(1, 24)), score_OD, sparsity).keep_OD
    if scope == "row" or isinstance(sparsity, SemiStructured):
        assert torch.equal(masks[-1], by_hand)


@pytest.mark.parametrize("sparsity", [HALF, SemiStructured(keep=2, group=4)])
def test_rows_are_solved_in_slabs_with_the_same_result(sparsity: Sparsity, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OD, gram = normal(10, 24, seed=8), gram_of(inputs(24))
    together_OD, together = prune(Admm(), weight_OD, gram, sparsity)
    monkeypatch.setattr(admm, "FITTED_NUMEL", 3 * 24)
    apart_OD, apart = prune(Admm(), weight_OD, gram, sparsity)
    assert torch.equal(apart.keep_OD, together.keep_OD)
    assert distance(apart_OD, together_OD) < 1e-3


@pytest.mark.parametrize("scale", [2.0**-16, 2.0**16])
def test_the_scale_of_the_inputs_changes_nothing(scale: float) -> None:
    weight_OD, gram = normal(10, 24, seed=8), gram_of(inputs(24))
    expected_OD, expected = prune(Admm(), weight_OD, gram, HALF)
    updated_OD, pruned = prune(Admm(), weight_OD, Gram(gram.gram_DD * scale, gram.num_tokens), HALF)
    assert torch.equal(pruned.keep_OD, expected.keep_OD)
    assert torch.equal(updated_OD, expected_OD)


def test_independent_features_make_it_wanda() -> None:
    """But for the ridge: it lifts the multipliers of pruned weights above their sizes."""
    weight_OD, power_D = normal(8, 40, seed=11), torch.logspace(-2, 2, 40)
    updated_OD, pruned = prune(Admm(damping=1e-6), weight_OD, Gram(torch.diag(power_D), num_tokens=1), HALF)
    x_TD = torch.diag(power_D.sqrt())
    assert torch.equal(pruned.keep_OD, solve(Wanda(), squares_of(x_TD), weight_OD, HALF).keep_OD)
    assert distance(updated_OD, weight_OD * pruned.keep_OD) < 1e-6


def test_nothing_to_prune_changes_nothing() -> None:
    weight_OD = normal(8, 40, seed=10)
    updated_OD, pruned = prune(Admm(), weight_OD, gram_of(inputs(40)), Unstructured(ratio=0.0))
    assert pruned.keep_OD.all()
    assert distance(updated_OD, weight_OD) < 1e-6


def test_dead_features_go_first_and_stay_as_they_are_where_they_survive() -> None:
    weight_OD, gram = normal(10, 20, seed=15), gram_of(with_dead_features(inputs(20)))
    _, pruned = prune(Admm(), weight_OD, gram, Unstructured(ratio=0.1))
    assert (~pruned.keep_OD).any(dim=0).nonzero().flatten().tolist() == DEAD
    updated_OD, pruned = prune(Admm(), weight_OD, gram, Unstructured(ratio=0.05))
    assert not pruned.keep_OD[:, DEAD[0]].any()
    assert torch.equal(updated_OD[:, DEAD[1]], weight_OD[:, DEAD[1]])


def test_inputs_that_were_never_active_still_give_the_exact_count() -> None:
    updated_OD, pruned = prune(Admm(), normal(6, 10, seed=18), Gram.empty(10, torch.device("cpu")), HALF)
    assert (~pruned.keep_OD).sum().item() == 30
    assert updated_OD.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_dtype_is_kept_and_the_dense_weight_left_alone(dtype: torch.dtype, transposed: bool) -> None:
    weight_OD = normal(40, 8, seed=14).to(dtype).T if transposed else normal(8, 40, seed=14).to(dtype)
    before_OD = weight_OD.clone()
    updated_OD, pruned = prune(Admm(), weight_OD, gram_of(inputs(40)), HALF)
    assert updated_OD.dtype == dtype
    assert pruned.keep_OD.dtype == torch.bool
    assert torch.equal(weight_OD, before_OD)


def test_the_damping_that_was_needed_is_noted() -> None:
    indefinite = Gram(torch.kron(torch.eye(4), torch.tensor([[1.0, 1.05], [1.05, 1.0]])), num_tokens=1)
    _, pruned = prune(Admm(damping=0.01), normal(6, 8, seed=19), indefinite, HALF)
    assert pruned.notes["damping"] == pytest.approx(0.1)
