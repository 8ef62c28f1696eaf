"""The laws of methods that fit the kept weights, however they choose the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.least_squares import FittingStep
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import Gram
from tests import reference
from tests.correlated import DEAD, distance, gram_of, inputs, normal, with_dead_features
from tests.fitted import HALF, SPARSITIES, prune

METHOD = pytest.mark.parametrize("method", [Admm, Alps])
SCOPE = pytest.mark.parametrize("scope", ["row", "matrix"])


@METHOD
@SCOPE
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_what_it_keeps_is_the_least_squares_fit_on_its_mask(
    method: type[FittingStep], scope: str, sparsity: Sparsity
) -> None:
    weight_OD, gram = normal(12, 40, seed=4), gram_of(inputs(40))
    step = method.model_validate({"scope": scope, "refining": 60})
    updated_OD, pruned = prune(step, weight_OD, gram, sparsity)
    hessian_DD = reference.power_hessian(gram.gram_DD, step.damping)
    assert distance(updated_OD, reference.fitted_rows(weight_OD, pruned.keep_OD, hessian_DD)) < 1e-4


STEPS = st.one_of(
    st.builds(
        lambda choosing, scope: Admm(choosing=choosing, scope=scope),
        st.integers(1, 6),
        st.sampled_from(["row", "matrix"]),
    ),
    st.builds(
        lambda limit, scope: Alps(limit=limit, scope=scope), st.integers(1, 20), st.sampled_from(["row", "matrix"])
    ),
)


@settings(max_examples=70, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    percent=st.integers(0, 99),
    step=STEPS,
    num_tokens=st.integers(1, 60),
)
def test_counts_are_exact(shape: tuple[int, int], percent: int, step: FittingStep, num_tokens: int) -> None:
    weight_OD = normal(*shape, seed=13)
    _, pruned = prune(step, weight_OD, gram_of(inputs(shape[1], num_tokens)), Unstructured(ratio=percent / 100))
    units = pruned.keep_OD if step.scope == "row" else pruned.keep_OD.reshape(1, -1)
    assert ((~units).sum(dim=1) == percent * units.shape[1] // 100).all()


@METHOD
@SCOPE
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 7), (5, 8)])
def test_a_pattern_holds_in_every_group_and_is_no_other_pattern(
    method: type[FittingStep], scope: str, keep: int, group: int
) -> None:
    step, weight_OD = method.model_validate({"scope": scope}), normal(10, 6 * group, seed=7)
    _, pruned = prune(step, weight_OD, gram_of(inputs(6 * group)), SemiStructured(keep=keep, group=group))
    assert (pruned.keep_OD.reshape(-1, group).sum(dim=1) == keep).all()


@METHOD
@pytest.mark.parametrize("scale", [2.0**-16, 2.0**16])
def test_the_scale_of_the_inputs_changes_nothing(method: type[FittingStep], scale: float) -> None:
    weight_OD, gram = normal(10, 24, seed=8), gram_of(inputs(24))
    expected_OD, expected = prune(method(), weight_OD, gram, HALF)
    updated_OD, pruned = prune(method(), weight_OD, Gram(gram.gram_DD * scale, gram.num_tokens), HALF)
    assert torch.equal(pruned.keep_OD, expected.keep_OD)
    assert torch.equal(updated_OD, expected_OD)


@METHOD
def test_nothing_to_prune_changes_nothing(method: type[FittingStep]) -> None:
    weight_OD = normal(8, 40, seed=10)
    updated_OD, pruned = prune(method(), weight_OD, gram_of(inputs(40)), Unstructured(ratio=0.0))
    assert pruned.keep_OD.all()
    assert distance(updated_OD, weight_OD) < 1e-6


@METHOD
def test_dead_features_go_first_and_stay_as_they_are_where_they_survive(method: type[FittingStep]) -> None:
    weight_OD, gram = normal(10, 20, seed=15), gram_of(with_dead_features(inputs(20)))
    _, pruned = prune(method(), weight_OD, gram, Unstructured(ratio=0.1))
    assert (~pruned.keep_OD).any(dim=0).nonzero().flatten().tolist() == DEAD
    updated_OD, pruned = prune(method(), weight_OD, gram, Unstructured(ratio=0.05))
    assert not pruned.keep_OD[:, DEAD[0]].any()
    assert torch.equal(updated_OD[:, DEAD[1]], weight_OD[:, DEAD[1]])


@METHOD
def test_inputs_that_were_never_active_still_give_the_exact_count(method: type[FittingStep]) -> None:
    updated_OD, pruned = prune(method(), normal(6, 10, seed=18), Gram.empty(10, torch.device("cpu")), HALF)
    assert (~pruned.keep_OD).sum().item() == 30
    assert updated_OD.isfinite().all()


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_dtype_is_kept_and_the_dense_weight_left_alone(
    method: type[FittingStep], dtype: torch.dtype, transposed: bool
) -> None:
    weight_OD = normal(40, 8, seed=14).to(dtype).T if transposed else normal(8, 40, seed=14).to(dtype)
    before_OD = weight_OD.clone()
    updated_OD, pruned = prune(method(), weight_OD, gram_of(inputs(40)), HALF)
    assert updated_OD.dtype == dtype
    assert pruned.keep_OD.dtype == torch.bool
    assert torch.equal(weight_OD, before_OD)


@METHOD
def test_the_damping_that_was_needed_is_noted(method: type[FittingStep]) -> None:
    indefinite = Gram(torch.kron(torch.eye(4), torch.tensor([[1.0, 1.05], [1.05, 1.0]])), num_tokens=1)
    _, pruned = prune(method(damping=0.01), normal(6, 8, seed=19), indefinite, HALF)
    assert pruned.notes["damping"] == pytest.approx(0.1)
