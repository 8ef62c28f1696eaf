"""Reconstruct on a small block: it undoes what a mask has done, on sequences it has not learnt from, or stays out."""

from collections.abc import Mapping, Sequence
from functools import cache

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.lazy_weights import Maker
from pipeline.methods.reconstruct import Reconstruct
from pipeline.methods.step import NOTHING, PrunedBlock, PrunedLinear, loss_scale
from pipeline.sparsity import Unstructured
from pipeline.statistics import AnyStatistic, relative_error
from pipeline.stream_names import StreamName
from tests import reference
from tests.blocks import SharedBlock, SmallBlock
from tests.replicas import ThreadPeer, together

HALF = Unstructured(ratio=0.5)
FEATURES, UNITS = 24, 48


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class MaskedMlp(SmallBlock):
    """y = x + relu((x * norm) up^T) down^T, with half of each row pruned at random: far from the dense block."""

    def __init__(self, num_sequences: int = 16, dtype: torch.dtype = torch.float32) -> None:
        mixing = normal(FEATURES, FEATURES, seed=9)  # inputs are correlated: kept weights can do others' work
        self.hidden_BTD = (normal(num_sequences, 12, FEATURES, seed=0) @ mixing).to(dtype) / FEATURES**0.5
        self.weights: Mapping[str, torch.Tensor] = {
            "up": normal(UNITS, FEATURES, seed=2).to(dtype) / 5,
            "down": normal(FEATURES, UNITS, seed=3).to(dtype) / 7,
        }
        self.others: Mapping[str, torch.Tensor] = {"norm.weight": torch.ones(FEATURES, dtype=dtype)}
        self.so_far: Mapping[str, PrunedLinear] = {
            name: PrunedLinear(keep_OD=normal(*weight.shape, seed=4) > 0) for name, weight in self.weights.items()
        }
        self.offset = 0.0

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        norm_D = others.get("norm.weight", self.others["norm.weight"])
        return self._run({name: make() for name, make in weights.items()}, norm_D, sequences)

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        expected = self._run(self.weights, self.others["norm.weight"], sequences)
        return expected + (self.offset if stream == "dense" else 0.0)

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        raise AssertionError("it needs none")

    def error(self, weights: Mapping[str, torch.Tensor], sequences: slice, stream: StreamName) -> float:
        output = self._run(weights, self.others["norm.weight"], sequences)
        return reference.relative_error(output, self.target(sequences, stream))

    def _run(self, weights: Mapping[str, torch.Tensor], norm_D: torch.Tensor, sequences: slice) -> torch.Tensor:
        hidden_BTD = self.hidden_BTD[sequences]
        return hidden_BTD + ((hidden_BTD * norm_D) @ weights["up"].T).relu() @ weights["down"].T


class NoisyMlp(MaskedMlp):
    """Its targets are noise of their own for every sequence: there is nothing in them that could be learnt."""

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        masked = {name: weight * self.so_far[name].keep_OD for name, weight in self.weights.items()}
        clean = self._run(masked, self.others["norm.weight"], slice(None))
        return (clean + 0.3 * normal(*clean.shape, seed=7))[sequences]


class ReplicaMlp(SharedBlock, MaskedMlp):
    """One of several replicas, each with its own part of the sequences."""

    def __init__(self, peer: ThreadPeer, shares: Sequence[slice]) -> None:
        super().__init__()
        self.share_out(peer, shares)


def masked(block: MaskedMlp) -> dict[str, torch.Tensor]:
    return {name: block.weights[name] * pruned.keep_OD for name, pruned in block.so_far.items()}


def new_weights(made: PrunedBlock) -> dict[str, torch.Tensor]:
    weights = {}
    for name, linear in made.linears.items():
        assert linear.weight_OD is not None
        weights[name] = linear.weight_OD
    return weights


def tune(block: MaskedMlp, step: Reconstruct) -> PrunedBlock:
    return step.prune(block, HALF, lambda figures: None)


@cache
def tuned(step: Reconstruct) -> tuple[MaskedMlp, PrunedBlock]:
    block = MaskedMlp()
    return block, tune(block, step)


PATIENT = Reconstruct(epochs=30, rate=0.02, target="pruned")


def test_most_of_the_error_of_a_mask_is_undone_also_on_sequences_it_never_saw() -> None:
    block, made = tuned(PATIENT)
    for sequences in (slice(0, 14), slice(14, 16)):  # two of sixteen are held out
        before = block.error(masked(block), sequences, "pruned")
        assert block.error(new_weights(made), sequences, "pruned") < 0.5 * before


def test_masks_stay_and_what_is_pruned_is_exactly_zero() -> None:
    block, made = tuned(PATIENT)
    for name, linear in made.linears.items():
        assert torch.equal(linear.keep_OD, block.so_far[name].keep_OD)
        assert not new_weights(made)[name][~linear.keep_OD].any()
        assert new_weights(made)[name].dtype == block.weights[name].dtype


def test_the_notes_are_the_errors_on_what_was_held_out() -> None:
    block, made = tuned(PATIENT)
    notes = made.linears["up"].notes
    held_out = [slice(14, 15), slice(15, 16)]
    for name, weights in (("error_before", masked(block)), ("error_after", new_weights(made))):
        expected = sum(block.error(weights, sequences, "pruned") for sequences in held_out) / 2
        assert notes[name] == pytest.approx(expected, rel=1e-4)
    assert notes["epochs"] >= 1


def test_what_cannot_be_learnt_leaves_the_weights_as_they_were() -> None:
    block = NoisyMlp()
    made = tune(block, Reconstruct(epochs=5, rate=0.3, target="pruned"))
    assert made.linears["up"].notes["epochs"] == 0
    for name, weight_OD in masked(block).items():
        assert torch.equal(new_weights(made)[name], weight_OD)


def test_without_sequences_held_out_it_learns_noise_by_heart() -> None:
    block = NoisyMlp()
    made = tune(block, Reconstruct(epochs=5, rate=0.03, target="pruned", held_out=0))
    assert made.linears["up"].notes["epochs"] == 5
    everything = slice(0, 16)
    assert block.error(new_weights(made), everything, "pruned") < block.error(masked(block), everything, "pruned")


def test_it_goes_on_from_the_weights_of_the_step_before() -> None:
    block = MaskedMlp()
    block.so_far = {
        name: PrunedLinear(keep_OD=pruned.keep_OD, weight_OD=2 * block.weights[name] * pruned.keep_OD)
        for name, pruned in block.so_far.items()
    }
    made = tune(block, Reconstruct(epochs=1, rate=1e-12, target="pruned", held_out=0))
    for name, weight_OD in masked(block).items():
        assert torch.allclose(new_weights(made)[name], 2 * weight_OD)


def test_it_learns_from_the_stream_that_it_is_told() -> None:
    block = MaskedMlp()
    block.offset = 0.5
    made = tune(block, Reconstruct(epochs=30, rate=0.02, target="dense"))
    everything = slice(0, 16)
    before = block.error(masked(block), everything, "dense")
    assert block.error(new_weights(made), everything, "dense") < 0.7 * before


def test_norms_are_tuned_only_where_asked() -> None:
    assert tuned(PATIENT)[1].others == {}
    block = MaskedMlp()
    made = tune(block, PATIENT.model_copy(update={"norms": True}))
    assert made.others.keys() == {"norm.weight"}
    assert not torch.equal(made.others["norm.weight"], block.others["norm.weight"])
    assert torch.equal(block.others["norm.weight"], torch.ones(FEATURES))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    step = Reconstruct(epochs=2, target="pruned")
    first, again, other = (tune(MaskedMlp(), s) for s in (step, step, step.model_copy(update={"seed": 1})))
    assert all(torch.equal(new_weights(first)[n], new_weights(again)[n]) for n in ("up", "down"))
    assert not torch.equal(new_weights(first)["up"], new_weights(other)["up"])


@pytest.mark.parametrize(
    "shares", [[slice(0, 8), slice(8, 16)], [slice(0, 11), slice(11, 16)], [slice(0, 16), slice(0, 0)]]
)
def test_replicas_end_with_the_same_bits(shares: list[slice]) -> None:
    step = Reconstruct(epochs=3, batch=2, rate=0.02, target="pruned")
    first, second = together(2, lambda peer: tune(ReplicaMlp(peer, shares), step))
    for name in ("up", "down"):
        assert torch.equal(new_weights(first)[name], new_weights(second)[name])
    block = MaskedMlp()
    assert block.error(new_weights(first), slice(0, 16), "pruned") < block.error(masked(block), slice(0, 16), "pruned")


def test_a_replica_without_sequences_changes_nothing() -> None:
    step = Reconstruct(epochs=2, target="pruned")
    with_idle = together(2, lambda peer: tune(ReplicaMlp(peer, [slice(0, 16), slice(0, 0)]), step))[0]
    alone = tune(MaskedMlp(), step)
    assert all(torch.equal(new_weights(with_idle)[n], new_weights(alone)[n]) for n in ("up", "down"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_of_16_bits_gets_weights_of_16_bits_that_do_better(dtype: torch.dtype) -> None:
    block = MaskedMlp(dtype=dtype)
    made = tune(block, PATIENT)
    assert new_weights(made)["up"].dtype == dtype
    everything = slice(0, 16)
    assert block.error(new_weights(made), everything, "pruned") < 0.6 * block.error(masked(block), everything, "pruned")


def test_gradients_of_long_batches_do_not_vanish_in_float16() -> None:
    generator = torch.Generator().manual_seed(0)
    target_BTD = torch.randn(1, 512, 512, generator=generator)
    output_BTD = (target_BTD + 0.003 * torch.randn(1, 512, 512, generator=generator)).half().requires_grad_()
    plain, scaled = (
        torch.autograd.grad(relative_error(output_BTD, target_BTD) * scale, output_BTD)[0]
        for scale in (1.0, loss_scale(output_BTD))
    )
    assert (plain == 0).float().mean() > 0.5
    assert (scaled == 0).float().mean() < 0.01
    assert scaled.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_need_no_scale(dtype: torch.dtype) -> None:
    assert loss_scale(torch.zeros(2, 3, 4, dtype=dtype)) == 1


@pytest.mark.parametrize(("num_sequences", "batch", "is_checked"), [(16, 8, True), (2, 1, True), (3, 4, False)])
def test_sequences_are_held_out_wherever_there_are_two_updates(
    num_sequences: int, batch: int, is_checked: bool
) -> None:
    made = tune(MaskedMlp(num_sequences), Reconstruct(epochs=1, batch=batch, target="pruned"))
    assert ("error_before" in made.linears["up"].notes) is is_checked


def test_a_second_tuning_goes_on_from_the_norms_of_the_first() -> None:
    block = MaskedMlp()
    block.tuned = {"norm.weight": torch.full((FEATURES,), 3.0)}
    made = tune(block, Reconstruct(epochs=1, rate=1e-12, target="pruned", norms=True, held_out=0))
    assert torch.allclose(made.others["norm.weight"], torch.full((FEATURES,), 3.0))


def test_numbers_that_are_not_finite_are_refused_with_the_way_out() -> None:
    block = MaskedMlp()
    block.hidden_BTD = block.hidden_BTD.index_fill(2, torch.tensor([3]), torch.inf)
    with pytest.raises(
        NumericsError, match=r"reconstruct's error became nan; .*`compute\.dtype: float32`, or lower `rate`"
    ):
        tune(block, Reconstruct(target="pruned"))
