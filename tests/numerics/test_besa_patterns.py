"""BESA on N:M: every row, or linear, keeps a number of each group of its own, and the block N of M on average."""

from functools import cache
from itertools import product
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sparsity
from pipeline.methods.besa import Besa
from pipeline.methods.dsnot import Dsnot
from pipeline.methods.learnable import own_pattern
from pipeline.methods.pattern_mix import LEEWAY, nearest_mix
from pipeline.methods.row_sparsity import MaskedWeight, nearest_counts, prefix_at_candidates, project_to_budget
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import LinearStep, PrunedLinear
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured, holds, row_ranks
from pipeline.statistics import Gathered
from tests import reference
from tests.mended import view_of
from tests.numerics.test_besa import MlpBlock, error_under

Granularity = Literal["row", "linear"]
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "linear"])
TWO_OF_FOUR, THREE_OF_EIGHT = SemiStructured(keep=2, group=4), SemiStructured(keep=3, group=8)
PATTERNS = pytest.mark.parametrize("pattern", [TWO_OF_FOUR, THREE_OF_EIGHT], ids=str)
MIXES = pytest.mark.parametrize(("granularity", "reach"), [("row", 1.0), ("row", 3.0), ("linear", 1.0)])
"""With a reach of 3, rows learn of 2:4 to drop nothing, which they must not."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def mixed(granularity: Granularity, pattern: SemiStructured, reach: float = 1.0) -> dict[str, PrunedLinear]:
    besa = Besa(mix=True, granularity=granularity, reach=reach)
    return besa.prune(MlpBlock(), pattern, lambda figures: None).linears


def kept_per_group(linear: PrunedLinear, pattern: SemiStructured) -> torch.Tensor:
    """Return [O, groups of a row]."""
    return linear.keep_OD.view(len(linear.keep_OD), -1, pattern.group).sum(dim=2)


# --------------------------------------------------------------------------------------------------- a whole block


@PATTERNS
@MIXES
def test_groups_of_a_row_keep_alike_and_neither_all_nor_none(
    granularity: Granularity, reach: float, pattern: SemiStructured
) -> None:
    for linear in mixed(granularity, pattern, reach).values():
        kept_OG = kept_per_group(linear, pattern)
        assert (kept_OG == kept_OG[:, :1]).all()
        assert 1 <= kept_OG.min() <= kept_OG.max() <= pattern.group - 1
        if granularity == "linear":
            assert kept_OG.min() == kept_OG.max()


@PATTERNS
@GRANULARITIES
def test_the_block_keeps_what_the_pattern_keeps(granularity: Granularity, pattern: SemiStructured) -> None:
    block = mixed(granularity, pattern)
    kept = sum(int(linear.keep_OD.sum()) for linear in block.values())
    total = sum(linear.keep_OD.numel() for linear in block.values())
    widest = max(linear.keep_OD.shape[1] for linear in block.values())
    short = total * pattern.keep // pattern.group - kept
    assert 0 <= short < (widest // pattern.group if granularity == "row" else LEEWAY * total + 1)


@pytest.mark.parametrize("granularity", ["row", "linear"])
def test_what_can_be_spared_keeps_less(granularity: Granularity) -> None:
    block = mixed(granularity, THREE_OF_EIGHT)
    assert block["up"].keep_OD.float().mean() < block["down"].keep_OD.float().mean()


def everywhere(pattern: SemiStructured) -> float:
    """Return the block's error under Wanda with the same pattern in every group."""
    block = MlpBlock()
    scores = {name: reference.wanda_scores(weight_OD, block.inputs(name)) for name, weight_OD in block.weights.items()}
    keep = {name: reference.keep_in_groups(s_OD, pattern.keep, pattern.group) for name, s_OD in scores.items()}
    return error_under(keep, block)


@PATTERNS
def test_rows_of_their_own_err_less_than_the_same_pattern_everywhere(pattern: SemiStructured) -> None:
    learnt = {name: linear.keep_OD for name, linear in mixed("row", pattern).items()}
    assert error_under(learnt, MlpBlock()) < 0.9 * everywhere(pattern)


def test_linears_of_their_own_err_less_where_another_mix_is_better() -> None:
    learnt = {name: linear.keep_OD for name, linear in mixed("linear", THREE_OF_EIGHT).items()}
    assert error_under(learnt, MlpBlock()) < 0.95 * everywhere(THREE_OF_EIGHT)


def test_the_pattern_itself_is_kept_where_no_mix_is_better() -> None:
    learnt = {name: linear.keep_OD for name, linear in mixed("linear", TWO_OF_FOUR).items()}
    assert error_under(learnt, MlpBlock()) == everywhere(TWO_OF_FOUR)


@pytest.mark.parametrize("keep", [1, 3])
@GRANULARITIES
def test_the_only_mix_there_is_of_a_pattern_is_itself(granularity: Granularity, keep: int) -> None:
    pattern = SemiStructured(keep=keep, group=4)
    block = Besa(mix=True, granularity=granularity).prune(MlpBlock(), pattern, lambda figures: None).linears
    assert all((kept_per_group(linear, pattern) == keep).all() for linear in block.values())


@GRANULARITIES
def test_groups_lose_their_lowest_wanda_scores(granularity: Granularity) -> None:
    block = MlpBlock()
    for name, linear in mixed(granularity, TWO_OF_FOUR).items():
        scores_OD = reference.wanda_scores(block.weights[name], block.inputs(name))
        for scores, keep, kept in zip(scores_OD, linear.keep_OD, kept_per_group(linear, TWO_OF_FOUR), strict=True):
            assert torch.equal(keep, reference.keep_in_groups(scores[None], int(kept[0]), 4)[0])


@GRANULARITIES
def test_two_runs_are_one(granularity: Granularity) -> None:
    first, again = mixed(granularity, TWO_OF_FOUR), mixed.__wrapped__(granularity, TWO_OF_FOUR)
    assert all(torch.equal(first[name].keep_OD, again[name].keep_OD) for name in first)


@PATTERNS
@MIXES
def test_every_linear_says_which_pattern_it_holds(
    granularity: Granularity, reach: float, pattern: SemiStructured
) -> None:
    for linear in mixed(granularity, pattern, reach).values():
        own = SemiStructured(keep=int(kept_per_group(linear, pattern).max()), group=pattern.group)
        assert linear.sparsity == own
        assert holds(linear.keep_OD, own)


@pytest.mark.parametrize(
    ("asked", "counts", "own"),
    [
        (TWO_OF_FOUR, [2, 2, 2], TWO_OF_FOUR),
        (TWO_OF_FOUR, [3, 1, 2], SemiStructured(keep=3, group=4)),
        (Unstructured(ratio=0.5), [7, 8, 9], None),
    ],
)
def test_the_pattern_of_a_linear_is_that_of_its_fullest_row(
    asked: Sparsity, counts: list[int], own: Sparsity | None
) -> None:
    assert own_pattern(asked, torch.tensor(counts)) == own


@pytest.mark.parametrize("step", [Dsnot(), Dsnot(criterion="mean", guard="none"), SparseGPT()], ids=repr)
@PATTERNS
@MIXES
def test_steps_that_follow_leave_every_group_what_the_mix_gave_it(
    granularity: Granularity, reach: float, pattern: SemiStructured, step: LinearStep
) -> None:
    block = MlpBlock()
    for name, linear in mixed(granularity, pattern, reach).items():
        assert linear.sparsity is not None
        statistics = Gathered(block.statistic(name, kind) for kind in step.statistics)
        after = step.solver(statistics)(view_of(block.weights[name], linear, linear.sparsity))
        assert torch.equal(kept_per_group(after, pattern), kept_per_group(linear, pattern))
        assert torch.equal(after.keep_OD, linear.keep_OD) == isinstance(step, SparseGPT)


# ----------------------------------------------------------------------------------------------- gradient in groups


@pytest.mark.parametrize("num_groups", [6, 1])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_the_gradient_is_that_of_the_soft_mask_of_every_group(group: int, num_groups: int) -> None:
    weight_OD, x_TD, y_TO = normal(6, 24, seed=5), normal(20, 24, seed=7), normal(20, 6, seed=8)
    rank_OD = row_ranks(normal(6 * 24 // group, group, seed=6)).view(6, 24)
    share_GP = torch.softmax(2 * normal(num_groups, group + 1, seed=4), dim=1)
    counts_G = torch.arange(num_groups) % group

    exact_GP = share_GP.double().requires_grad_()
    exact_OD = reference.straight_through_weight(exact_GP, weight_OD.double(), rank_OD, counts_G, group)
    torch.autograd.backward((x_TD.double() @ exact_OD.T - y_TO).square().sum())

    share_GP.requires_grad_()
    masked_OD = MaskedWeight.apply(share_GP, weight_OD, rank_OD, counts_G, group)  # type: ignore[no-untyped-call]
    torch.autograd.backward((x_TD @ masked_OD.T - y_TO).square().sum())

    assert torch.equal(masked_OD, exact_OD.detach().float())
    assert share_GP.grad is not None
    assert exact_GP.grad is not None
    assert ((share_GP.grad.double() - exact_GP.grad).norm() / exact_GP.grad.norm()).item() < 1e-5


def test_slabs_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OD, rank_OD = normal(40, 24, seed=5), row_ranks(normal(240, 4, seed=6)).view(40, 24)
    whole = prefix_at_candidates(weight_OD.sin(), weight_OD.__getitem__, rank_OD, 5, 4)
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 7 * 24 + 1)
    assert torch.equal(prefix_at_candidates(weight_OD.sin(), weight_OD.__getitem__, rank_OD, 5, 4), whole)


def test_ranks_of_a_group_take_a_byte() -> None:
    assert row_ranks(normal(6, 8, seed=0)).dtype == torch.uint8


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 1), (0.37, 1), (0.38, 2), (0.62, 2), (0.63, 3), (1.0, 3)])
def test_a_group_drops_the_nearest_whole_count_and_neither_none_nor_all(alpha: float, count: int) -> None:
    assert nearest_counts(torch.tensor([alpha]), 4).tolist() == [count]


# ----------------------------------------------------------------------------------------------------------- budget

PARTS = st.integers(0, 100).map(lambda percent: percent / 100)


def all_mixes(alphas: list[float], sizes: list[int], pattern: SemiStructured) -> list[tuple[float, int]]:
    """Return (distance to what was learnt, weights kept) of every mix there is."""
    group, mixes = pattern.group, []
    for kept in product(range(1, group), repeat=len(sizes)):
        terms = zip(kept, alphas, sizes, strict=True)
        distance = sum(size * (keep / group - (1 - alpha)) ** 2 for keep, alpha, size in terms)
        mixes.append((distance, sum(keep * size // group for keep, size in zip(kept, sizes, strict=True))))
    return mixes


@settings(deadline=None, max_examples=60)
@given(
    linears=st.lists(st.tuples(PARTS, st.integers(1, 30)), min_size=1, max_size=4),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (3, 5), (4, 8)]),
)
def test_the_mix_is_the_nearest_within_the_budget_of_all_there_are(
    linears: list[tuple[float, int]], pattern: tuple[int, int]
) -> None:
    asked = SemiStructured(keep=pattern[0], group=pattern[1])
    alphas, sizes = [alpha for alpha, _ in linears], [size * asked.group for _, size in linears]
    kept = nearest_mix(alphas, sizes, asked)
    budget, total = asked.keep * sum(sizes) // asked.group, sum(sizes)
    within = [
        (distance, num) for distance, num in all_mixes(alphas, sizes, asked) if budget - LEEWAY * total <= num <= budget
    ]
    distance = sum(
        size * (keep / asked.group - (1 - alpha)) ** 2 for keep, alpha, size in zip(kept, alphas, sizes, strict=True)
    )
    num_kept = sum(keep * size // asked.group for keep, size in zip(kept, sizes, strict=True))
    assert (num_kept, all(1 <= keep < asked.group for keep in kept)) in {(num, True) for _, num in within}
    assert distance == pytest.approx(min(within)[0], abs=1e-9)


def test_linears_that_learnt_nothing_keep_the_pattern_itself() -> None:
    assert (
        nearest_mix([0.5] * 7, [576 * 576, 192 * 576, 192 * 576, 576 * 576] + [1536 * 576] * 3, TWO_OF_FOUR) == [2] * 7
    )


def test_many_experts_are_mixed_as_well() -> None:
    alphas = [0.25 if expert % 2 else 0.75 for expert in range(200)]
    assert nearest_mix(alphas, [1024] * 200, TWO_OF_FOUR) == [3 if expert % 2 else 1 for expert in range(200)]


@settings(deadline=None)
@given(
    linears=st.lists(st.tuples(st.integers(1, 12), st.lists(PARTS, min_size=1, max_size=8)), min_size=1, max_size=4),
    keep=st.integers(1, 7),
)
def test_rows_meet_the_budget_to_less_than_one_row(linears: list[tuple[int, list[float]]], keep: int) -> None:
    group, units = 8, [unit for unit, _ in linears]
    total = sum(group * unit * len(alphas) for unit, alphas in linears)
    budget = total // group * (group - keep)
    counts = project_to_budget([torch.tensor(a) for _, a in linears], [group] * len(linears), budget, units, least=1)
    dropped = sum(unit * int(part.sum()) for unit, part in zip(units, counts, strict=True))
    assert 0 <= dropped - budget < max(units)
    assert all(int(part.min()) >= 1 and int(part.max()) < group for part in counts)
