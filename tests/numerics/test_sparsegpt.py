"""SparseGPT against a naive optimal brain surgeon that inverts the Hessian anew for every column."""

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT, inverse_factor, removal_cost
from pipeline.methods.step import LinearView, PrunedLinear
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import ColumnSquares, Gathered, Gram
from tests import reference
from tests.solving import solve

HALF = Unstructured(ratio=0.5)
DAMPING = 0.01


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_features: int, num_tokens: int = 600) -> torch.Tensor:
    """Correlated tokens: a few hidden causes, seen by all features, and noise of their own."""
    causes = normal(num_tokens, max(1, num_features // 4), seed=1)
    return causes @ normal(causes.shape[1], num_features, seed=2) + normal(num_tokens, num_features, seed=3)


def gram_of(x_TD: torch.Tensor) -> Gram:
    gram = Gram.empty(x_TD.shape[1], x_TD.device)
    gram.update(x_TD)
    return gram


def prune(
    weight_OD: torch.Tensor,
    gram: Gram,
    sparsity: Sparsity,
    keep_OD: torch.Tensor | None = None,
    slab: int = 128,
    damping: float = DAMPING,
) -> tuple[torch.Tensor, PrunedLinear]:
    pruned = solve(SparseGPT(damping=damping, slab=slab), gram, weight_OD, sparsity, keep_OD)
    assert pruned.weight_OD is not None
    return pruned.weight_OD, pruned


def naive(weight_OD: torch.Tensor, gram: Gram, choose: reference.Choice) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.brain_surgeon(weight_OD, reference.damped_hessian(gram.gram_DD, DAMPING), choose)


def given(keep_OD: torch.Tensor) -> reference.Choice:
    return lambda j, cost_OR: keep_OD if j == 0 else None


def by_slab(slab: int, percent: int) -> reference.Choice:
    """All rows of a slab compete; the counts of the slabs so far are the floor of the fraction of what they hold."""

    def choose(j: int, cost_OR: torch.Tensor) -> torch.Tensor | None:
        num_rows, width = cost_OR.shape[0], min(slab, cost_OR.shape[1])
        count = percent * num_rows * (j + width) // 100 - percent * num_rows * j // 100
        return reference.keep_in_matrix(cost_OR[:, :width].T, count).T if j % slab == 0 else None

    return choose


def by_group(keep: int, group: int) -> reference.Choice:
    return lambda j, cost_OR: reference.keep_in_groups(cost_OR[:, :group], keep, group) if j % group == 0 else None


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize(("num_columns", "slab"), [(32, 128), (96, 32), (100, 24), (37, 1), (160, 128)])
def test_a_given_mask_gets_the_update_of_naive_brain_surgery(num_columns: int, slab: int) -> None:
    weight_OD, gram = normal(24, num_columns, seed=4), gram_of(inputs(num_columns))
    keep_OD = normal(24, num_columns, seed=5) > 0.2
    updated_OD, pruned = prune(weight_OD, gram, HALF, keep_OD, slab)
    expected_OD, _ = naive(weight_OD, gram, given(keep_OD))
    assert distance(updated_OD, expected_OD) < 1e-5
    assert torch.equal(pruned.keep_OD, keep_OD)
    assert not updated_OD[~keep_OD].any()


@pytest.mark.parametrize(("num_columns", "slab"), [(20, 128), (40, 16), (45, 16), (12, 1)])
@pytest.mark.parametrize("percent", [29, 50, 70])
def test_each_slab_loses_what_costs_least_by_then(num_columns: int, slab: int, percent: int) -> None:
    weight_OD, gram = normal(8, num_columns, seed=6), gram_of(inputs(num_columns))
    updated_OD, pruned = prune(weight_OD, gram, Unstructured(ratio=percent / 100), slab=slab)
    expected_OD, expected_keep_OD = naive(weight_OD, gram, by_slab(slab, percent))
    assert torch.equal(pruned.keep_OD, expected_keep_OD)
    assert distance(updated_OD, expected_OD) < 1e-5


@pytest.mark.parametrize(("keep", "group", "num_columns", "slab"), [(2, 4, 24, 128), (1, 4, 24, 10), (3, 7, 42, 21)])
def test_each_group_loses_what_costs_least_by_then(keep: int, group: int, num_columns: int, slab: int) -> None:
    weight_OD, gram = normal(10, num_columns, seed=7), gram_of(inputs(num_columns))
    updated_OD, pruned = prune(weight_OD, gram, SemiStructured(keep=keep, group=group), slab=slab)
    expected_OD, expected_keep_OD = naive(weight_OD, gram, by_group(keep, group))
    assert torch.equal(pruned.keep_OD, expected_keep_OD)
    assert (pruned.keep_OD.reshape(-1, group).sum(dim=1) == keep).all()
    assert distance(updated_OD, expected_OD) < 1e-5


def test_a_mask_chosen_on_updated_weights_is_another_than_on_dense_ones() -> None:
    """Else the two tests above could pass without the update reaching the choice."""
    weight_OD, gram = normal(10, 24, seed=7), gram_of(inputs(24))
    _, by_turns = naive(weight_OD, gram, by_group(2, 4))
    _, at_once = naive(weight_OD, gram, lambda j, c: reference.keep_in_groups(c, 2, 4) if j == 0 else None)
    assert not torch.equal(by_turns, at_once)


def test_one_slab_is_the_cheapest_of_all_masks() -> None:
    weight_OD, gram = normal(3, 4, seed=8), gram_of(inputs(4))
    hessian_DD = reference.damped_hessian(gram.gram_DD, DAMPING)
    own_D = torch.stack([torch.linalg.inv(hessian_DD[j:, j:])[0, 0] for j in range(4)])
    cost_OD = weight_OD.double().square() / own_D
    masks = [torch.tensor([bits >> i & 1 for i in range(12)]).bool().reshape(3, 4) for bits in range(1 << 12)]
    cheapest = min((mask for mask in masks if mask.sum() == 7), key=lambda mask: cost_OD[~mask].sum().item())
    assert torch.equal(prune(weight_OD, gram, Unstructured(ratio=5 / 12))[1].keep_OD, cheapest)


def test_the_cost_of_a_weight_is_what_the_best_later_columns_cannot_repair() -> None:
    """Remove one weight, fit the columns after it by least squares, and see what error is left."""
    weight_OD, gram = normal(1, 12, seed=9), gram_of(inputs(12))
    factor = inverse_factor(gram.gram_DD, DAMPING)
    cost_D = removal_cost(weight_OD.T.contiguous(), factor, slice(0, 12))[:, 0]
    hessian_DD = reference.damped_hessian(gram.gram_DD, DAMPING)
    for j in range(12):
        change = torch.zeros(12, dtype=torch.float64)
        change[j] = -weight_OD[0, j]
        change[j + 1 :] = torch.linalg.solve(hessian_DD[j + 1 :, j + 1 :], -hessian_DD[j + 1 :, j] * change[j])
        assert cost_D[j].item() == pytest.approx((change @ hessian_DD @ change).item(), rel=1e-4)


@pytest.mark.parametrize("sparsity", [Unstructured(ratio=0.0), HALF])
def test_where_nothing_is_pruned_nothing_changes(sparsity: Sparsity) -> None:
    weight_OD = normal(8, 40, seed=10)
    keep_OD = None if sparsity.ratio == 0 else torch.ones(8, 40, dtype=torch.bool)
    updated_OD, pruned = prune(weight_OD, gram_of(inputs(40)), sparsity, keep_OD, slab=16)
    assert torch.equal(updated_OD, weight_OD)
    assert pruned.keep_OD.all()


def test_independent_features_make_it_magnitude_weighted_by_their_power() -> None:
    weight_OD = normal(8, 40, seed=11)
    gram = Gram(torch.diag(torch.logspace(-2, 2, 40)), num_tokens=1)
    updated_OD, pruned = prune(weight_OD, gram, HALF)
    power_D = reference.damped_hessian(gram.gram_DD, DAMPING).diagonal()
    weighted = (weight_OD.double() * power_D.sqrt()).float()
    assert torch.equal(pruned.keep_OD, solve(Magnitude(), [], weighted, HALF).keep_OD)
    assert torch.equal(updated_OD, weight_OD * pruned.keep_OD)


@pytest.mark.parametrize("sparsity", [HALF, Unstructured(ratio=0.7), SemiStructured(keep=2, group=4)])
def test_correlated_inputs_let_it_err_less_than_wanda(sparsity: Sparsity) -> None:
    weight_OD, x_TD = normal(32, 64, seed=12), inputs(64)
    squares = ColumnSquares.empty(64, x_TD.device)
    squares.update(x_TD)
    keep_OD = solve(Wanda(), squares, weight_OD, sparsity).keep_OD
    own_OD, own = prune(weight_OD, gram_of(x_TD), sparsity)
    wandas_OD, wandas = prune(weight_OD, gram_of(x_TD), sparsity, keep_OD)
    assert own.keep_OD.sum() <= keep_OD.sum()  # Wanda rounds down in every row, so it may keep some more
    assert torch.equal(wandas.keep_OD, keep_OD)
    dense_error = reference.output_error(weight_OD, weight_OD * keep_OD, x_TD)
    assert reference.output_error(weight_OD, own_OD, x_TD) < 0.9 * dense_error
    assert reference.output_error(weight_OD, wandas_OD, x_TD) < 0.9 * dense_error


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 50), (16, 129)])
@pytest.mark.parametrize("percent", [1, 29, 50, 99])
@pytest.mark.parametrize("slab", [1, 13, 128])
def test_counts_are_exact(shape: tuple[int, int], percent: int, slab: int) -> None:
    weight_OD = normal(*shape, seed=13)
    updated_OD, pruned = prune(weight_OD, gram_of(inputs(shape[1])), Unstructured(ratio=percent / 100), slab=slab)
    assert (~pruned.keep_OD).sum().item() == percent * weight_OD.numel() // 100
    assert not updated_OD[~pruned.keep_OD].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_the_dense_weight_left_alone(dtype: torch.dtype) -> None:
    weight_OD = normal(8, 40, seed=14).to(dtype)
    before = weight_OD.clone()
    updated_OD, pruned = prune(weight_OD, gram_of(inputs(40)), HALF)
    assert updated_OD.dtype == dtype
    assert pruned.keep_OD.dtype == torch.bool
    assert torch.equal(weight_OD, before)


@pytest.mark.parametrize("shape", [(8, 40), (1, 40), (8, 1)])
def test_a_weight_stored_transposed_gives_the_same_and_is_left_alone(shape: tuple[int, int]) -> None:
    """As gpt2 stores its linears: [D, O] in memory, seen as [O, D]."""
    weight_OD, gram = normal(*shape, seed=22), gram_of(inputs(shape[1]))
    expected_OD, expected = prune(weight_OD.clone(), gram, HALF)
    stored_DO = weight_OD.T.clone(memory_format=torch.contiguous_format)
    updated_OD, pruned = prune(stored_DO.T, gram, HALF)
    assert torch.equal(stored_DO.T, weight_OD)
    assert torch.equal(updated_OD, expected_OD)
    assert torch.equal(pruned.keep_OD, expected.keep_OD)


def with_dead_features(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.index_fill(1, torch.tensor([3, 17]), 0)


def test_dead_features_go_first_and_change_nothing_else() -> None:
    weight_OD, gram = normal(10, 20, seed=15), gram_of(with_dead_features(inputs(20)))
    updated_OD, pruned = prune(weight_OD, gram, Unstructured(ratio=0.1))
    assert (~pruned.keep_OD).any(dim=0).nonzero().flatten().tolist() == [3, 17]
    assert torch.equal(updated_OD, weight_OD.index_fill(1, torch.tensor([3, 17]), 0))


def test_dead_features_that_survive_are_left_alone() -> None:
    weight_OD, gram = normal(10, 20, seed=16), gram_of(with_dead_features(inputs(20)))
    keep_OD = normal(10, 20, seed=17) > 0
    updated_OD, _ = prune(weight_OD, gram, HALF, keep_OD)
    expected_OD, _ = naive(weight_OD, gram, given(keep_OD))
    assert distance(updated_OD, expected_OD) < 1e-5
    assert torch.equal(updated_OD[:, [3, 17]], (weight_OD * keep_OD)[:, [3, 17]])


def test_inputs_that_were_never_active_still_give_the_exact_count() -> None:
    updated_OD, pruned = prune(normal(6, 10, seed=18), Gram.empty(10, torch.device("cpu")), HALF)
    assert (~pruned.keep_OD).sum().item() == 30
    assert updated_OD.isfinite().all()


@pytest.mark.parametrize("num_tokens", [20, 600])
@pytest.mark.parametrize("num_features", [1, 40, 100])
def test_the_factor_is_that_of_the_inverse(num_features: int, num_tokens: int) -> None:
    gram = gram_of(with_dead_features(inputs(num_features, num_tokens)) if num_features > 20 else inputs(num_features))
    factor = inverse_factor(gram.gram_DD, DAMPING)
    upper_DD, live = factor.upper_DD.double(), ~factor.dead_D
    inverse_DD = torch.linalg.inv(reference.damped_hessian(gram.gram_DD, DAMPING))
    assert torch.equal(factor.dead_D, gram.gram_DD.diagonal() == 0)
    assert not factor.upper_DD.tril(-1).any()
    assert distance((upper_DD.T @ upper_DD)[live][:, live], inverse_DD[live][:, live]) < 1e-4
    assert factor.damping == DAMPING


def pairwise(off_diagonal: float) -> Gram:
    """A Gram matrix that rounding has made indefinite: eigenvalues 1 + and 1 - `off_diagonal`."""
    pair = torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])
    return Gram(torch.kron(torch.eye(4), pair), num_tokens=1)


@pytest.mark.parametrize(
    ("off_diagonal", "damping", "needed"),
    [(0.9, 0.01, 0.01), (1.05, 0.01, 0.1), (1.5, 0.01, 1.0), (1.2, 0.03, 0.3), (1.5, 0.03, 1.0)],
)
def test_damping_grows_until_the_factorisation_succeeds_and_is_noted(
    off_diagonal: float, damping: float, needed: float
) -> None:
    weight_OD = normal(6, 8, seed=19)
    updated_OD, pruned = prune(weight_OD, pairwise(off_diagonal), HALF, damping=damping)
    assert pruned.notes["damping"] == pytest.approx(needed)
    hessian_DD = reference.damped_hessian(pairwise(off_diagonal).gram_DD, needed)
    expected_OD, _ = reference.brain_surgeon(weight_OD, hessian_DD, given(pruned.keep_OD))
    assert distance(updated_OD, expected_OD) < 1e-5


def test_a_matrix_that_no_damping_mends_is_refused_with_its_numbers() -> None:
    message = r"Gram matrix of 8 input features could not be factorised .* 0\.01 to 1 of its mean diagonal 1; use more"
    with pytest.raises(NumericsError, match=message):
        SparseGPT(damping=DAMPING).solver(Gathered([pairwise(3.0)]))


def test_the_factor_of_one_input_serves_all_its_linears() -> None:
    solver = SparseGPT().solver(Gathered([gram_of(inputs(24))]))
    first, again = (solver(LinearView(dense_OD=normal(5, 24, seed=20), sparsity=HALF)) for _ in range(2))
    solver(LinearView(dense_OD=normal(9, 24, seed=21), sparsity=HALF))
    assert first.weight_OD is not None
    assert again.weight_OD is not None
    assert torch.equal(first.weight_OD, again.weight_OD)
