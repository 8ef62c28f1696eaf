"""Norms of features sequence by sequence: what 2SSP scores neurons by, against a plain loop."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.linears import Collector, find_linears
from pipeline.sequence_norms import SequenceNorms
from pipeline.statistics import ColumnSquares

CPU = torch.device("cpu")


def sequences(num_sequences: int = 5, num_tokens: int = 7, num_features: int = 6, seed: int = 0) -> torch.Tensor:
    x_BTD = torch.randn(num_sequences, num_tokens, num_features, generator=torch.Generator().manual_seed(seed))
    return x_BTD * torch.logspace(-1, 1, num_features)


def collect(*x_TD: torch.Tensor) -> SequenceNorms:
    statistic = SequenceNorms.empty(x_TD[0].shape[1], CPU)
    for sequence_TD in x_TD:
        statistic.update(sequence_TD)
    return statistic


def test_the_score_is_the_mean_over_sequences_of_the_norm_over_tokens() -> None:
    x_BTD = sequences()
    by_hand = [
        sum(sqrt(sum(value * value for value in x_TD[:, feature].tolist())) for x_TD in x_BTD) / 5
        for feature in range(6)
    ]
    found = collect(*x_BTD)
    assert found.mean_D.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert found.mean_D.dtype == torch.float64
    assert (found.num_tokens, found.count_1.tolist()) == (35, [5])


def test_one_loud_sequence_counts_less_than_in_sums_of_squares() -> None:
    x_BTD = torch.ones(4, 3, 2)
    x_BTD[:, :, 1] = torch.tensor([3.0, 0.1, 0.1, 0.1])[:, None]  # loud in one sequence only
    norms, squares = collect(*x_BTD).mean_D, ColumnSquares.empty(2, CPU)
    squares.update(x_BTD.flatten(0, 1))
    assert norms.argmin().item() == 1
    assert squares.squares_D.argmin().item() == 0


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_merged_shards_of_whole_sequences_are_the_whole(cuts: list[int], seed: int) -> None:
    x_BTD, merged = sequences(seed=seed), SequenceNorms.empty(6, CPU)
    for start, stop in pairwise([0, *sorted(cuts), 5]):
        part = SequenceNorms.empty(6, CPU)
        for x_TD in x_BTD[start:stop]:
            part.update(x_TD)
        merged.merge(part)
    torch.testing.assert_close(merged.mean_D, collect(*x_BTD).mean_D)
    assert merged.num_tokens == 35


def test_a_long_sequence_is_one_however_many_slabs_it_takes() -> None:
    x_TD = sequences(1, 50_000)[0]
    torch.testing.assert_close(collect(x_TD).mean_D, x_TD.double().norm(dim=0))


def test_the_statistic_of_some_features_is_what_these_alone_would_have_given() -> None:
    x_BTD, features = sequences(), torch.tensor([1, 4])
    narrow, alone = collect(*x_BTD).narrowed(features), collect(*x_BTD[:, :, features])
    assert torch.equal(narrow.mean_D, alone.mean_D)
    assert narrow.num_tokens == 35
    assert [tensor.numel() * 8 for tensor in narrow.sums()] == [16, 8]
    assert SequenceNorms.bytes_of(2) == 24


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x_BTD = sequences()
    assert collect(*x_BTD).is_finite()
    x_BTD[2, 3, 4] = bad
    assert not collect(*x_BTD).is_finite()


def test_a_collector_keeps_the_sequences_of_a_batch_apart() -> None:
    x_BTD, block = sequences(), nn.Sequential(nn.Linear(6, 3, bias=False))
    collector = Collector(find_linears(block), (SequenceNorms, ColumnSquares))
    for start, first in ((0, None), (2, 2)):  # of the second batch the last is held out
        with torch.no_grad(), collector.watching(block, to_the_end=True, first=first):
            block(x_BTD[start : start + (2 if start == 0 else 3)])
    gathered = collector.gathered("0")
    torch.testing.assert_close(gathered.of(SequenceNorms).mean_D, collect(*x_BTD[:4]).mean_D)
    torch.testing.assert_close(
        gathered.of(ColumnSquares).squares_D, x_BTD[:4].double().square().sum(dim=(0, 1)), check_dtype=False
    )
