"""Neurons that go by a metric, what makes up for them, and who judges whether it does."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.lazy_weights import Maker
from pipeline.methods.step import NOTHING
from pipeline.methods.structured.baselines import fluctuation, wanda_sp
from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.narrowing import Comp, CutBlock, Narrowing, NeuronMetric, Units, WandaSp
from pipeline.methods.structured.recovery import LARGEST_FACTOR
from pipeline.methods.structured.selection import Rounds, select
from pipeline.statistics import AnyStatistic, ColumnSquares, Gathered, Gram, Moments
from pipeline.stream_names import StreamName
from tests.blocks import SharedBlock, SmallBlock
from tests.replicas import ThreadPeer, together

NUM_SEQUENCES, NUM_NEURONS, NUM_KEPT = 16, 24, 16
KINDS = (ColumnSquares, Moments, Gram)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(num_tokens: int = 60) -> torch.Tensor:
    """Of neurons that have causes in common, as those of a language model have: some stand in for others."""
    causes = normal(NUM_SEQUENCES, num_tokens, 10, seed=0) @ normal(10, NUM_NEURONS, seed=1)
    own = 0.3 * normal(NUM_SEQUENCES, num_tokens, NUM_NEURONS, seed=2)
    return (causes + own) * torch.linspace(0.3, 2, NUM_NEURONS)


class ReaderBlock(SmallBlock):
    """A `BlockView` of the linear that reads the neurons alone; `surprise` is added to the last sequences."""

    def __init__(self, surprise: float = 0.0) -> None:
        self.hidden_BTD = activations()
        self.weights: Mapping[str, torch.Tensor] = {"down": normal(12, NUM_NEURONS, seed=3)}
        self.everything = self.hidden_BTD.clone()
        if surprise:
            self.hidden_BTD[-2:] = surprise * normal(2, *self.hidden_BTD.shape[1:], seed=4)

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        return self.hidden_BTD[sequences] @ weights["down"]().T

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        return gathered(self.hidden_BTD).of(kind)

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        assert stream == "pruned"
        return self.hidden_BTD[sequences] @ self.weights["down"].T


class ReplicaBlock(SharedBlock, ReaderBlock):
    """The same on one of several replicas, which have `shares` of the sequences."""

    def __init__(self, peer: ThreadPeer, shares: Sequence[slice]) -> None:
        super().__init__()
        self.share_out(peer, shares)


def gathered(*parts_BTD: torch.Tensor) -> Gathered:
    statistics = [kind.empty(NUM_NEURONS, torch.device("cpu")) for kind in KINDS]
    for statistic in statistics:
        for part_BTD in parts_BTD:
            statistic.update(part_BTD.flatten(0, 1))
    return Gathered(statistics)


def neurons(step: Narrowing, block: ReaderBlock) -> Units:
    num_fitted = step.num_fitted(block.num_sequences)
    return Units(
        reader="down", num_kept=NUM_KEPT, gathered=gathered(block.hidden_BTD[:num_fitted]), num_fitted=num_fitted
    )


def cut(step: Narrowing, block: ReaderBlock) -> CutBlock:
    return step.cut(block, neurons(step, block), lambda figures: None)


def squared_error(block: ReaderBlock, made: CutBlock, sequences: slice) -> float:
    weight_OU = block.weights["down"].double()
    left_OU = torch.zeros_like(weight_OU)
    left_OU[:, made.keep_U] = weight_OU[:, made.keep_U] if made.folded_OK is None else made.folded_OK
    x_TU = block.hidden_BTD[sequences].flatten(0, 1).double()
    return float(((x_TU @ (weight_OU - left_OU).T).square().sum() / (x_TU @ weight_OU.T).square().sum()).sqrt())


@pytest.mark.parametrize("recovery", ["mask", "lstsq"])
def test_a_recovery_errs_less_on_held_out_sequences_than_none(recovery: str) -> None:
    block = ReaderBlock()
    none, mended = (cut(Comp.model_validate({"recovery": name}), block) for name in ("none", recovery))
    held_out = slice(14, 16)
    assert squared_error(block, mended, held_out) < 0.95 * squared_error(block, none, held_out)
    assert mended.notes["error_after"] < mended.notes["error_before"]
    assert mended.notes["recovered"] == 1.0


@pytest.mark.parametrize("recovery", ["mask", "lstsq"])
def test_a_recovery_that_does_not_help_on_held_out_sequences_is_given_up(recovery: str) -> None:
    made = cut(Comp.model_validate({"recovery": recovery}), ReaderBlock(surprise=3.0))
    assert made.folded_OK is None
    assert made.notes["recovered"] == 0.0
    assert made.notes["error_after"] == made.notes["error_before"]


@pytest.mark.parametrize("metric", ["condition", "forward", "kappa", "wanda_sp", "flap"])
@pytest.mark.parametrize("recovery", ["mask", "lstsq", "none"])
def test_each_metric_keeps_what_its_formula_says_whatever_the_recovery(metric: NeuronMetric, recovery: str) -> None:
    block, step = ReaderBlock(), Comp.model_validate({"neuron_metric": metric, "recovery": recovery})
    made, all_of = cut(step, block), neurons(step, block).gathered
    weight_OU, num_pruned = block.weights["down"], NUM_NEURONS - NUM_KEPT
    if metric in ("wanda_sp", "flap"):
        squares_U, variance_U = all_of.of(ColumnSquares).squares_D, all_of.of(Moments).variance_D
        score_U = wanda_sp(weight_OU, squares_U) if metric == "wanda_sp" else fluctuation(weight_OU, variance_U)
        wanted_U = score_U >= score_U.sort().values[num_pruned]
    else:
        problem = MaskProblem(weight_OD=weight_OU, gram_DD=all_of.of(Gram).gram_DD)
        wanted_U = select(problem, num_pruned, Rounds(metric=metric, at_bound="freeze")).keep_U  # type: ignore[arg-type]
    assert torch.equal(made.keep_U, wanted_U)
    assert int(made.keep_U.sum()) == NUM_KEPT
    assert made.folded_OK is None or made.folded_OK.shape == (12, NUM_KEPT)


@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        (Comp(), {Gram}), (Comp(recovery="none"), {Gram}), (WandaSp(), {ColumnSquares}),
        (WandaSp(recovery="mask"), {ColumnSquares, Gram}), (Comp(neuron_metric="flap", recovery="none"), {Moments}),
    ],
)  # fmt: skip
def test_only_what_is_needed_is_gathered(step: Narrowing, kinds: set[type]) -> None:
    assert set(step.neuron_statistics) == kinds
    assert step.statistics == ()
    assert step.needs_targets == (step.recovery != "none")


@pytest.mark.parametrize("held_out", [0.6, 0.75, 0.99])
@pytest.mark.parametrize("num_sequences", [2, 3, 7])
def test_something_is_always_left_to_learn_from_and_to_judge_by(held_out: float, num_sequences: int) -> None:
    assert 0 < Comp(held_out=held_out).num_fitted(num_sequences) < num_sequences


@pytest.mark.parametrize(("asked", "fitted"), [(1, 1), (2, 1), (8, 7), (16, 14), (100, 88)])
def test_an_eighth_of_the_sequences_is_held_out_and_one_at_least(asked: int, fitted: int) -> None:
    assert Comp().num_fitted(asked) == fitted
    assert Comp(recovery="none").num_fitted(asked) == asked


def test_a_mask_is_never_followed_beyond_its_bound() -> None:
    block = ReaderBlock()
    made = cut(Comp(mask_var_max=100.0, damping=1e-6), block)
    assert made.folded_OK is not None
    factors = made.folded_OK / block.weights["down"][:, made.keep_U]
    assert factors.abs().max() <= LARGEST_FACTOR


@pytest.mark.parametrize("recovery", ["mask", "lstsq"])
@pytest.mark.parametrize("shares", [[slice(0, 8), slice(8, 16)], [slice(0, 3), slice(3, 11), slice(11, 16)]], ids=str)
def test_all_replicas_end_with_the_same_bits(recovery: str, shares: list[slice]) -> None:
    step = Comp.model_validate({"recovery": recovery})
    fitted = [ReaderBlock().hidden_BTD[s][: step.num_fitted(s.stop - s.start)] for s in shares]

    def work(peer: ThreadPeer) -> CutBlock:
        block = ReplicaBlock(peer, shares)
        mine = Units(reader="down", num_kept=NUM_KEPT, gathered=gathered(*fitted), num_fitted=len(fitted[peer.rank]))
        return step.cut(block, mine, lambda figures: None)

    first, *others = together(len(shares), work)
    assert first.folded_OK is not None
    for other in others:
        assert torch.equal(first.keep_U, other.keep_U)
        assert other.folded_OK is not None
        assert torch.equal(first.folded_OK, other.folded_OK)
        assert first.notes == other.notes


def test_without_a_sequence_to_judge_by_a_recovery_is_refused() -> None:
    step, block = Comp(), ReaderBlock()
    block.hidden_BTD = block.hidden_BTD[:1]
    with pytest.raises(ConfigError, match=r"judged on sequences held out, and with one sequence .* `recovery: none`"):
        cut(step, block)
