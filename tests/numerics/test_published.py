"""Steps of others: FLAP's bias, by the book and for whole blocks; 2SSP's neurons."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError

from pipeline.lazy_weights import Maker
from pipeline.methods.step import NOTHING
from pipeline.methods.structured.narrowing import Comp, CutBlock, Narrowing, Units
from pipeline.methods.structured.published import Flap, TwoSsp
from pipeline.sequence_norms import SequenceNorms
from pipeline.statistics import ColumnSquares, Gathered, Gram, Moments
from tests.blocks import SharedBlock
from tests.numerics.test_narrowing import NUM_KEPT, NUM_NEURONS, ReaderBlock, gathered, normal
from tests.replicas import ThreadPeer, together

BIAS = "down.bias"


class BiasedBlock(ReaderBlock):
    """The linear that reads the neurons, with a bias; neurons have means of their own, as behind an activation."""

    def __init__(self, surprise: float = 0.0, mean: float = 1.0) -> None:
        super().__init__(surprise)
        self.hidden_BTD = self.hidden_BTD + mean * normal(NUM_NEURONS, seed=5)
        self.others: Mapping[str, torch.Tensor] = {BIAS: normal(12, seed=6)}

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        return super().output(weights, sequences) + {**self.others, **others}[BIAS].float()

    def target(self, sequences: slice, stream: str) -> torch.Tensor:
        return super().target(sequences, "pruned") + self.others[BIAS]


class BiasedReplica(SharedBlock, BiasedBlock):
    """The same on one of several replicas, which have `shares` of the sequences."""

    def __init__(self, peer: ThreadPeer, shares: Sequence[slice]) -> None:
        super().__init__()
        self.share_out(peer, shares)


def cut(step: Narrowing, block: ReaderBlock) -> CutBlock:
    num_fitted = step.num_fitted(block.num_sequences)
    statistics = gathered(block.hidden_BTD[:num_fitted]).holding(step.neuron_statistics)
    neurons = Units(reader="down", num_kept=NUM_KEPT, gathered=statistics, num_fitted=num_fitted)
    return step.cut(block, neurons, lambda figures: None)


@pytest.mark.parametrize("step", [Flap(), Comp(recovery="bias"), Flap(neuron_metric="wanda_sp")], ids=str)
def test_the_bias_is_what_the_neurons_that_go_gave_on_average(step: Narrowing) -> None:
    block = BiasedBlock()
    made = cut(step, block)
    weight, x, gone = block.weights["down"].tolist(), block.hidden_BTD[:14].flatten(0, 1).double(), ~made.keep_U
    mean = [x[:, j].sum().item() / len(x) for j in range(NUM_NEURONS)]
    by_hand = [
        block.others[BIAS][row].item() + sum(weight[row][j] * mean[j] for j in range(NUM_NEURONS) if gone[j])
        for row in range(12)
    ]
    assert made.bias_O is not None
    assert made.bias_O.tolist() == pytest.approx(by_hand, rel=1e-9)
    assert made.folded_OK is None
    assert made.notes["recovered"] == 1.0
    assert "recovery_damping" not in made.notes


def test_outputs_have_their_mean_again_on_the_tokens_that_were_learnt_from() -> None:
    block = BiasedBlock()
    made = cut(Flap(), block)
    x = block.hidden_BTD[:14].flatten(0, 1).double()
    dense_O = (x @ block.weights["down"].double().T).mean(dim=0) + block.others[BIAS]
    assert made.bias_O is not None
    left_O = (x[:, made.keep_U] @ block.weights["down"][:, made.keep_U].double().T).mean(dim=0) + made.bias_O
    torch.testing.assert_close(left_O, dense_O)


def test_of_the_tokens_that_were_learnt_from_no_other_bias_loses_less() -> None:
    block = BiasedBlock()
    made = cut(Flap(), block)
    x, weight = block.hidden_BTD[:14].flatten(0, 1).double(), block.weights["down"].double()
    missing = x[:, ~made.keep_U] @ weight[:, ~made.keep_U].T + block.others[BIAS]
    assert made.bias_O is not None
    least = (missing - made.bias_O).square().sum()
    for seed in range(5):
        assert (missing - made.bias_O - 0.01 * normal(12, seed=seed)).square().sum() > least


def test_a_bias_that_does_not_help_on_held_out_sequences_is_given_up() -> None:
    block = BiasedBlock()
    block.hidden_BTD[14:] = -block.hidden_BTD[14:]
    made = cut(Flap(), block)
    assert made.bias_O is None
    assert made.notes["recovered"] == 0.0
    assert made.notes["error_after"] == made.notes["error_before"]


def test_neurons_that_never_vary_go_first_and_nothing_is_missed() -> None:
    block = BiasedBlock()
    still = torch.tensor([0, 5, 7, 11, 13, 17, 20, 23])
    block.hidden_BTD[:, :, still] = normal(8, seed=7)
    made = cut(Flap(), block)
    assert (~made.keep_U).nonzero()[:, 0].tolist() == still.tolist()
    assert made.notes["error_after"] < 1e-9 < made.notes["error_before"]


@pytest.mark.parametrize("shares", [[slice(0, 8), slice(8, 16)], [slice(0, 3), slice(3, 11), slice(11, 16)]], ids=str)
def test_all_replicas_end_with_the_same_bias(shares: list[slice]) -> None:
    step = Flap()
    fitted = [BiasedBlock().hidden_BTD[s][: step.num_fitted(s.stop - s.start)] for s in shares]

    def work(peer: ThreadPeer) -> CutBlock:
        block = BiasedReplica(peer, shares)
        mine = Units(reader="down", num_kept=NUM_KEPT, gathered=gathered(*fitted), num_fitted=len(fitted[peer.rank]))
        return step.cut(block, mine, lambda figures: None)

    first, *others = together(len(shares), work)
    assert first.bias_O is not None
    for other in others:
        assert other.bias_O is not None
        assert torch.equal(first.bias_O, other.bias_O)
        assert torch.equal(first.keep_U, other.keep_U)
        assert first.notes == other.notes


@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        (Flap(), {Moments}), (Flap(recovery="none"), {Moments}), (Flap(recovery="mask"), {Moments, Gram}),
        (Comp(recovery="bias"), {Gram, Moments}), (Flap(neuron_metric="wanda_sp"), {ColumnSquares, Moments}),
    ],
)  # fmt: skip
def test_only_what_the_metric_and_the_bias_need_is_gathered(step: Narrowing, kinds: set[type]) -> None:
    assert set(step.neuron_statistics) == kinds
    assert step.num_recoveries == {"bias": 1, "none": 0, "mask": 5}[step.recovery]


@pytest.mark.parametrize("recovery", ["none", "bias"])
def test_neurons_of_the_least_mean_norm_go(recovery: str) -> None:
    block, norms = BiasedBlock(), SequenceNorms.empty(NUM_NEURONS, torch.device("cpu"))
    for x_TU in block.hidden_BTD[:14]:
        norms.update(x_TU)
    step = TwoSsp.model_validate({"recovery": recovery})
    assert set(step.neuron_statistics) == {SequenceNorms, *([Moments] if recovery == "bias" else [])}
    statistics = Gathered([norms, gathered(block.hidden_BTD[:14]).of(Moments)])
    made = step.cut(
        block, Units(reader="down", num_kept=NUM_KEPT, gathered=statistics, num_fitted=14), lambda figures: None
    )
    by_hand = [sum(x_TU[:, unit].double().norm().item() for x_TU in block.hidden_BTD[:14]) for unit in range(24)]
    least = sorted(range(24), key=lambda unit: by_hand[unit])[: NUM_NEURONS - NUM_KEPT]
    assert (~made.keep_U).nonzero()[:, 0].tolist() == sorted(least)
    assert (made.bias_O is None) == (recovery == "none")


def test_whole_blocks_stay_with_2ssp() -> None:
    assert TwoSsp().num_dropped(32, Fraction(1, 2)) == 0
    with pytest.raises(ValidationError, match=r"depth_fraction\n.*less than or equal to 0"):
        TwoSsp(depth_fraction=0.5)
