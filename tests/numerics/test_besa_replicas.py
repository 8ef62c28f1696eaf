"""BESA over replicas: every update sees the sequences of all, and all learn the same."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from pipeline.lazy_weights import Maker
from pipeline.methods.besa import Besa
from pipeline.methods.quantisation import Quantize
from pipeline.methods.step import NOTHING, PrunedLinear
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.statistics import AnyStatistic
from pipeline.stream_names import StreamName
from tests.blocks import SharedBlock, SmallBlock
from tests.replicas import ThreadPeer, together

NUM_SEQUENCES = 6
HALF = Unstructured(ratio=0.5)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LinearBlock(SmallBlock):
    """A `BlockView` of one linear, y = x W^T, that holds some of the sequences."""

    def __init__(self, sequences: slice = slice(0, NUM_SEQUENCES)) -> None:
        everything_BTD = normal(NUM_SEQUENCES, 10, 24, seed=0) * torch.linspace(0.1, 3, 24)
        self.hidden_BTD = everything_BTD[sequences]
        self.all_inputs = everything_BTD.flatten(0, 1)
        self.weights: Mapping[str, torch.Tensor] = {"linear": normal(12, 24, seed=1)}

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        statistic = kind.empty(24, torch.device("cpu"))
        statistic.update(self.all_inputs)
        return statistic

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        return self.hidden_BTD[sequences] @ weights["linear"]().T

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        return self.hidden_BTD[sequences] @ self.weights["linear"].T


class ReplicaBlock(SharedBlock, LinearBlock):
    """The same on one of several replicas, which have `shares` of the sequences."""

    def __init__(self, peer: ThreadPeer, shares: Sequence[slice]) -> None:
        super().__init__()
        self.share_out(peer, shares)


BESA = Besa()
OTHERS = pytest.mark.parametrize(
    ("besa", "sparsity"),
    [
        (Besa(quantize=Quantize(bits=3, group=8)), HALF),
        (Besa(mix=True), SemiStructured(keep=2, group=4)),
        (Besa(mix=True, granularity="linear"), SemiStructured(keep=2, group=4)),
    ],
    ids=["quantised", "rows mixed", "linears mixed"],
)


def pruned_by(
    shares: Sequence[slice], besa: Besa = BESA, sparsity: Sparsity = HALF
) -> list[tuple[PrunedLinear, list[float]]]:
    def work(peer: ThreadPeer) -> tuple[PrunedLinear, list[float]]:
        seen: list[float] = []
        block = ReplicaBlock(peer, shares)
        pruned = besa.prune(block, sparsity, lambda figures: seen.append(figures["sparsity"])).linears
        return pruned["linear"], seen

    return together(len(shares), work)


@pytest.mark.parametrize("shares", [[slice(0, 3), slice(3, 6)], [slice(0, 4), slice(4, 6)]], ids=["even", "uneven"])
def test_all_replicas_learn_the_same_and_meet_the_budget(shares: list[slice]) -> None:
    (first, seen), (second, seen_too) = pruned_by(shares)
    assert torch.equal(first.keep_OD, second.keep_OD)
    assert seen == seen_too
    assert len(seen) == max(share.stop - share.start for share in shares)
    assert int((~first.keep_OD).sum()) == 12 * 24 // 2


@OTHERS
def test_patterns_and_grids_come_out_alike_on_all_replicas(besa: Besa, sparsity: Sparsity) -> None:
    (first, _), (second, _) = pruned_by([slice(0, 4), slice(4, 6)], besa, sparsity)
    assert torch.equal(first.keep_OD, second.keep_OD)
    if besa.quantises:
        assert first.weight_OD is not None
        assert second.weight_OD is not None
        assert torch.equal(first.weight_OD, second.weight_OD)


@OTHERS
def test_patterns_and_grids_of_replicas_with_the_same_sequences_are_those_of_one(
    besa: Besa, sparsity: Sparsity
) -> None:
    alone = besa.prune(LinearBlock(slice(0, 3)), sparsity, lambda figures: None).linears["linear"]
    for twin, _ in pruned_by([slice(0, 3), slice(0, 3)], besa, sparsity):
        assert torch.equal(twin.keep_OD, alone.keep_OD)
        assert twin.notes == pytest.approx(alone.notes)


def test_replicas_with_the_same_sequences_learn_what_one_learns() -> None:
    """The mean over equal parts is the part: sums, weights and the penalty come out as without replicas."""
    alone = Besa().prune(LinearBlock(slice(0, 3)), HALF, lambda figures: None).linears
    for twin, _ in pruned_by([slice(0, 3), slice(0, 3)]):
        assert torch.equal(twin.keep_OD, alone["linear"].keep_OD)


def test_more_sequences_in_an_update_learn_something_else() -> None:
    alone = Besa().prune(LinearBlock(), HALF, lambda figures: None).linears
    assert not torch.equal(pruned_by([slice(0, 3), slice(3, 6)])[0][0].keep_OD, alone["linear"].keep_OD)
