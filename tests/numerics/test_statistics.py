"""Statistics are sums: parts merge into the whole, and what is not finite is seen."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.statistics import ColumnSquares, Gram, Moments, relative_error
from tests import reference

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", [ColumnSquares, Moments, Gram])
Kind = type[ColumnSquares] | type[Moments] | type[Gram]


def tokens(num_tokens: int, num_features: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose features differ in scale by a thousand, as those of language models do."""
    x_TD = torch.randn(num_tokens, num_features, generator=torch.Generator().manual_seed(seed))
    return x_TD * torch.logspace(-1.5, 1.5, num_features)


def collect(kind: Kind, *batches: torch.Tensor) -> ColumnSquares | Moments | Gram:
    statistic = kind.empty(batches[0].shape[1], CPU)
    for batch in batches:
        statistic.update(batch)
    return statistic


def values(statistic: ColumnSquares | Moments | Gram) -> torch.Tensor:
    return statistic.gram_DD if isinstance(statistic, Gram) else statistic.squares_D


def textbook(kind: Kind, x_TD: torch.Tensor) -> torch.Tensor:
    exact_TD = x_TD.double()
    return exact_TD.square().sum(dim=0) if kind is not Gram else exact_TD.T @ exact_TD


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the size of the pair of features it belongs to."""
    diagonal = right if right.dim() == 1 else right.diagonal()
    size = diagonal if right.dim() == 1 else torch.outer(diagonal.sqrt(), diagonal.sqrt())
    return ((left.double() - right.double()).abs() / size.double()).max().item()


TOLERANCE = {ColumnSquares: 1e-12, Moments: 1e-12, Gram: 1e-5}


@KINDS
def test_a_statistic_of_some_features_is_what_these_alone_would_have_given(kind: Kind) -> None:
    x_TD, features = tokens(40, 12), torch.tensor([0, 3, 4, 11])
    narrow, alone = collect(kind, x_TD).narrowed(features), collect(kind, x_TD[:, features].contiguous())
    assert narrow.num_tokens == 40
    for left, right in zip(narrow.sums(), alone.sums(), strict=True):
        torch.testing.assert_close(left, right, rtol=TOLERANCE[kind], atol=1e-5 if kind is Gram else 0)


@KINDS
@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 200), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_merged_shards_are_the_whole(kind: Kind, cuts: list[int], seed: int) -> None:
    x_TD = tokens(200, 12, seed)
    edges = [0, *sorted(cuts), 200]
    shards = [collect(kind, x_TD[a:b]) for a, b in pairwise(edges)]
    merged = kind.empty(12, CPU)
    for shard in shards:
        merged.merge(shard)  # type: ignore[arg-type]
    assert merged.num_tokens == 200
    assert distance(values(merged), values(collect(kind, x_TD))) < TOLERANCE[kind]


@KINDS
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_by_batch_is_all_at_once(kind: Kind, size: int) -> None:
    x_TD = tokens(300, 16)
    by_batch = collect(kind, *torch.split(x_TD, size))
    assert by_batch.num_tokens == 300
    assert distance(values(by_batch), values(collect(kind, x_TD))) < TOLERANCE[kind]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_those_of_the_inputs_as_given(kind: Kind, dtype: torch.dtype) -> None:
    x_TD = tokens(2000, 16).to(dtype)
    assert distance(values(collect(kind, x_TD)), textbook(kind, x_TD)) < 1e-5


def test_column_squares_do_not_lose_small_tokens_after_large_ones() -> None:
    large, small = torch.full((1, 1), 1e5), torch.full((100, 1), 1.0)
    assert values(collect(ColumnSquares, large, small)).item() == 1e10 + 100


@KINDS
def test_inputs_are_left_as_they_were(kind: Kind) -> None:
    x_TD = tokens(5, 3)
    before = x_TD.clone()
    collect(kind, x_TD)
    assert torch.equal(x_TD, before)


@KINDS
def test_a_merge_leaves_the_other_as_it_was(kind: Kind) -> None:
    left, right = collect(kind, tokens(5, 3)), collect(kind, tokens(4, 3, seed=1))
    before = values(right).clone()
    left.merge(right)  # type: ignore[arg-type]
    assert torch.equal(values(right), before)
    assert (left.num_tokens, right.num_tokens) == (9, 4)


@KINDS
def test_no_tokens_make_zero(kind: Kind) -> None:
    statistic = kind.empty(4, CPU)
    assert statistic.num_tokens == 0
    assert statistic.is_finite()
    assert not values(statistic).any()


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 3])
def test_one_number_that_is_not_finite_is_seen(kind: Kind, bad: float, column: int) -> None:
    x_TD = tokens(10, 4)
    assert collect(kind, x_TD).is_finite()
    x_TD[6, column] = bad
    assert not collect(kind, tokens(3, 4), x_TD, tokens(3, 4)).is_finite()


def moments_of(x_TD: torch.Tensor, *cuts: int) -> Moments:
    """Gathered by replicas, who sum what adds up over tokens."""
    parts = [collect(Moments, part) for part in torch.tensor_split(x_TD, cuts)]
    for mine, *others in zip(*(part.sums() for part in parts), strict=True):
        for other in others:
            mine += other
    assert isinstance(parts[0], Moments)
    return parts[0]


@pytest.mark.parametrize("cuts", [(), (40,), (1, 2, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_and_variance_are_over_the_tokens_of_all_replicas(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    x_TD = (tokens(200, 12) + 30).to(dtype)
    moments = moments_of(x_TD, *cuts)
    assert torch.allclose(moments.mean_D, x_TD.double().mean(dim=0), rtol=1e-12)
    assert torch.allclose(moments.mean_squares_D, x_TD.double().square().mean(dim=0), rtol=1e-12)
    assert torch.allclose(moments.variance_D, x_TD.double().var(dim=0, correction=0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 1e-3, 7.1, 1e5])
def test_the_variance_of_an_input_that_never_varies_is_rounding_at_most(constant: float) -> None:
    variance = moments_of(torch.full((3000, 1), constant), 700).variance_D.item()
    assert 0 <= variance <= 1e-13 * constant**2


def test_an_input_whose_square_leaves_float32_is_held_by_column_squares_and_seen_by_the_gram() -> None:
    x_TD = tokens(10, 4)
    x_TD[6, 1] = 1e30
    squares = collect(ColumnSquares, x_TD)
    assert squares.is_finite()
    assert squares.squares_D[1].item() == pytest.approx(1e60, rel=1e-6)
    assert not collect(Gram, x_TD).is_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error_is_the_mean_over_channels(dtype: torch.dtype) -> None:
    target = tokens(30, 8).reshape(3, 10, 8).to(dtype)
    output = (target.float() + 0.1 * tokens(30, 8, seed=1).reshape(3, 10, 8)).to(dtype)
    assert relative_error(output, target).item() == pytest.approx(reference.relative_error(output, target), rel=1e-5)
    assert relative_error(output, target).dtype == torch.float32
    assert relative_error(target, target).item() == 0


def test_a_loud_channel_counts_no_more_than_a_quiet_one() -> None:
    target = torch.ones(1, 6, 2) * torch.tensor([1e-3, 1e3])
    assert relative_error(target * torch.tensor([1.5, 1.0]), target).item() == pytest.approx(0.125)
    assert relative_error(target * torch.tensor([1.0, 1.5]), target).item() == pytest.approx(0.125)


@pytest.mark.parametrize("leak", [0.0, 1e-3])
def test_a_channel_that_is_silent_in_the_target_counts_as_zero(leak: float) -> None:
    target = tokens(12, 4).reshape(2, 6, 4).index_fill(2, torch.tensor([1]), 0)
    output = (target * 1.1).index_fill(2, torch.tensor([1]), leak).requires_grad_()
    error = relative_error(output, target)
    (gradient,) = torch.autograd.grad(error, output)
    assert error.item() == pytest.approx(0.75 * 0.01, rel=1e-4)
    assert error.item() == pytest.approx(reference.relative_error(output.detach(), target), rel=1e-4)
    assert gradient.isfinite().all()
    assert not gradient[..., 1].any()


def test_relative_error_is_differentiable_in_the_output() -> None:
    target = tokens(12, 4).reshape(2, 6, 4)
    output = (1.2 * target).requires_grad_()
    (gradient,) = torch.autograd.grad(relative_error(output, target), output)
    expected = 2 * (output - target) / target.square().sum(dim=(0, 1)) / 4
    assert torch.allclose(gradient, expected, rtol=1e-5)
