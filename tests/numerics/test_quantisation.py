"""Fake quantisation: the grid of the textbook, straight-through gradients that are autograd's, and laws."""

from functools import cache
from typing import Literal

import pytest
import torch

from pipeline import sparsity
from pipeline.methods.besa import Besa
from pipeline.methods.quantisation import (
    QuantisedMaskedWeight,
    Quantize,
    grids_of,
    in_grids,
    quantised,
    strength_gradient,
    strengths,
)
from pipeline.methods.step import PrunedLinear
from pipeline.sparsity import SemiStructured, Unstructured, row_ranks
from tests import reference, reference_grids
from tests.numerics.test_besa import MlpBlock

SHAPES = pytest.mark.parametrize(("shape", "group"), [((3, 16), 8), ((5, 24), None), ((4, 40), 16), ((1, 7), 3)])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_strengths(shape: tuple[int, int], options: Quantize) -> torch.Tensor:
    """Clipping strengths from 0.4 to 1, all different."""
    size = (2, shape[0], options.num_grids(shape[1]))
    return 0.4 + 0.6 * torch.rand(size, generator=torch.Generator().manual_seed(9))


def ones(shape: tuple[int, int], options: Quantize) -> torch.Tensor:
    return torch.ones(2, shape[0], options.num_grids(shape[1]))


# ------------------------------------------------------------------------------------------------------------- values


@BITS
@SHAPES
def test_weights_lie_on_the_textbooks_grid(shape: tuple[int, int], group: int | None, bits: int) -> None:
    options, weight_OD = Quantize(bits=bits, group=group), normal(*shape, seed=1)
    strength_2OQ = some_strengths(shape, options)
    expected = reference_grids.quantised(weight_OD, strength_2OQ, bits, group)
    assert torch.allclose(quantised(weight_OD, strength_2OQ, options).double(), expected, atol=1e-6)


@BITS
@SHAPES
def test_without_clipping_the_grid_is_min_max(shape: tuple[int, int], group: int | None, bits: int) -> None:
    """Written without the strengths: levels from the least to the greatest weight, zero moved onto one."""
    options, weight_OD = Quantize(bits=bits, group=group), normal(*shape, seed=2)
    on_grid_OD = quantised(weight_OD, ones(shape, options), options)
    for weight, on_grid in zip(
        torch.split(weight_OD, group or shape[1], dim=1), torch.split(on_grid_OD, group or shape[1], dim=1), strict=True
    ):
        low = weight.amin(dim=1, keepdim=True).clamp(max=0)
        high = weight.amax(dim=1, keepdim=True).clamp(min=0)
        step = (high - low) / (2**bits - 1)
        assert (
            (on_grid - weight).abs() <= step * 1.5
        ).all()  # half a step, half for the move of zero, half for the rounded step
        levels = on_grid / step
        assert torch.allclose(levels, levels.round(), rtol=2**-8, atol=1e-4)  # steps are rounded


@SHAPES
def test_a_fine_grid_changes_nothing(shape: tuple[int, int], group: int | None) -> None:
    options = Quantize.model_construct(bits=20, group=group)
    weight_OD = normal(*shape, seed=3)
    assert torch.allclose(quantised(weight_OD, ones(shape, options), options), weight_OD, atol=0.02)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_and_a_bfloat16_step_give_back_the_same_weights(bits: int, dtype: torch.dtype) -> None:
    """What a packed checkpoint holds: levels of b bits, and for every grid a step and the level of zero."""
    options, weight_OD = Quantize(bits=bits, group=32), normal(6, 64, seed=4).to(dtype)
    strength_2OQ = some_strengths((6, 64), options)
    on_grid_OD = quantised(weight_OD, strength_2OQ, options)
    grids = grids_of(in_grids(weight_OD, options), strength_2OQ, bits)
    step_OQ1, zero_OQ1 = grids.step_RQ1.bfloat16(), grids.zero_RQ1
    level_OQS = (on_grid_OD.view(6, 2, 32).float() / step_OQ1.float()).round() + zero_OQ1
    assert (level_OQS >= 0).all()
    assert (level_OQS <= 2**bits - 1).all()
    unpacked_OD = ((level_OQS - zero_OQ1) * step_OQ1.float()).to(dtype).view(6, 64)
    assert on_grid_OD.dtype == dtype
    assert torch.equal(unpacked_OD, on_grid_OD)


def test_zero_is_always_a_level() -> None:
    weight_OD = torch.cat([normal(4, 16, seed=5).abs() + 1, -normal(4, 16, seed=6).abs() - 1])
    weight_OD[:, 3] = 0
    for bits in (2, 4, 8):
        options = Quantize(bits=bits, group=None)
        assert (quantised(weight_OD, some_strengths((8, 16), options), options)[:, 3] == 0).all()


def test_a_grid_of_zeros_stays_zero() -> None:
    options = Quantize(group=4)
    assert torch.equal(quantised(torch.zeros(2, 8), ones((2, 8), options), options), torch.zeros(2, 8))


def test_the_last_grid_of_a_row_may_be_shorter() -> None:
    options, weight_OD = Quantize(group=4), normal(3, 10, seed=7)
    assert options.num_grids(10) == 3
    whole = quantised(weight_OD, ones((3, 10), options), options)
    tail = quantised(weight_OD[:, 8:], torch.ones(2, 3, 1), Quantize(group=2))
    assert torch.equal(whole[:, 8:], tail)


def test_before_learning_nearly_nothing_is_clipped() -> None:
    assert strengths(torch.zeros(2, 3)).flatten().tolist() == pytest.approx([0.98201] * 6, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- gradient


@BITS
@SHAPES
def test_the_gradient_of_the_strengths_is_autograds(shape: tuple[int, int], group: int | None, bits: int) -> None:
    options, weight_OD = Quantize(bits=bits, group=group), normal(*shape, seed=8)
    grad_OD, strength_2OQ = normal(*shape, seed=10), some_strengths(shape, options)
    exact = strength_2OQ.double().requires_grad_()
    torch.autograd.backward((reference_grids.quantised(weight_OD, exact, bits, group) * grad_OD).sum())
    closed_2OQ = strength_gradient(grad_OD, weight_OD, strength_2OQ, options)
    assert exact.grad is not None
    assert torch.allclose(closed_2OQ.double(), exact.grad, atol=1e-4)


@pytest.mark.parametrize("groups", ["row", "linear"])
@pytest.mark.parametrize("stretch", [24, 4])
def test_shares_and_strengths_learn_together_as_written_out(groups: str, stretch: int) -> None:
    options, weight_OD = Quantize(bits=3, group=8), normal(6, 24, seed=11)
    rank_OD = row_ranks(normal(6 * 24 // stretch, stretch, seed=12)).view(6, 24)
    num = 6 if groups == "row" else 1
    share_GP = torch.softmax(2 * normal(num, stretch + 1 if stretch == 4 else 101, seed=13), dim=1)
    counts_G = torch.arange(num) % stretch
    x_TD, y_TO, strength_2OQ = normal(30, 24, seed=14), normal(30, 6, seed=15), some_strengths((6, 24), options)

    exact_GP, exact_2OQ = share_GP.double().requires_grad_(), strength_2OQ.double().requires_grad_()
    on_grid_OD = reference_grids.quantised(weight_OD, exact_2OQ, 3, 8)
    exact_OD = reference.straight_through_weight(exact_GP, on_grid_OD, rank_OD, counts_G, stretch)
    torch.autograd.backward((x_TD.double() @ exact_OD.T - y_TO).square().sum())

    share_GP.requires_grad_()
    strength_2OQ.requires_grad_()
    masked_OD = QuantisedMaskedWeight.apply(  # type: ignore[no-untyped-call]
        share_GP, strength_2OQ, weight_OD, rank_OD, counts_G, stretch, options
    )
    torch.autograd.backward((x_TD @ masked_OD.T - y_TO).square().sum())

    assert torch.allclose(masked_OD.double(), exact_OD.detach(), atol=1e-6)
    for closed, exact in ((share_GP.grad, exact_GP.grad), (strength_2OQ.grad, exact_2OQ.grad)):
        assert closed is not None
        assert exact is not None
        assert ((closed.double() - exact).norm() / exact.norm()).item() < 1e-5


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options, weight_OD = Quantize(bits=4, group=16), normal(20, 32, seed=16)
    share_GP = torch.softmax(normal(20, 101, seed=17), dim=1).requires_grad_()
    strength_2OQ = some_strengths((20, 32), options).requires_grad_()
    fixed = (weight_OD, row_ranks(normal(20, 32, seed=18)), torch.arange(20), 32, options)

    def outcome() -> list[torch.Tensor]:
        masked_OD = QuantisedMaskedWeight.apply(share_GP, strength_2OQ, *fixed)  # type: ignore[no-untyped-call]
        return [masked_OD.detach(), *torch.autograd.grad(masked_OD.sin().sum(), [share_GP, strength_2OQ])]

    whole = outcome()
    monkeypatch.setattr(sparsity, "SLAB_NUMEL", 3 * 32 + 1)
    assert all(torch.equal(one, other) for one, other in zip(whole, outcome(), strict=True))


# ------------------------------------------------------------------------------------------------------- a whole block

FOUR_BITS = Quantize(bits=4, group=20)


@cache
def joint(granularity: Literal["row", "linear"]) -> dict[str, PrunedLinear]:
    besa = Besa(granularity=granularity, quantize=FOUR_BITS)
    return besa.prune(MlpBlock(), Unstructured(ratio=0.5), lambda figures: None).linears


def error_of(linears: dict[str, torch.Tensor]) -> float:
    block = MlpBlock()
    everything = slice(0, block.num_sequences)
    return reference.relative_error(block.output_with(linears, everything), block.target(everything, "pruned"))


def written(linear: PrunedLinear) -> torch.Tensor:
    assert linear.weight_OD is not None
    return linear.weight_OD


GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "linear"])


@GRANULARITIES
def test_a_quantised_block_loses_exactly_its_budget(granularity: Literal["row", "linear"]) -> None:
    linears = joint(granularity).values()
    assert sum(int((~linear.keep_OD).sum()) for linear in linears) == 40 * 80
    for linear in linears:
        assert (written(linear)[~linear.keep_OD] == 0).all()
        assert not written(linear)[~linear.keep_OD].signbit().any()


@GRANULARITIES
def test_every_grid_of_a_block_has_few_levels(granularity: Literal["row", "linear"]) -> None:
    for linear in joint(granularity).values():
        for grid in written(linear).reshape(-1, 20):
            levels = grid.unique()
            assert len(levels) <= 16
            assert (levels == 0).any()


@GRANULARITIES
def test_joint_learning_errs_less_than_quantising_first_and_wanda_then(granularity: Literal["row", "linear"]) -> None:
    """Joint-Wanda, as BESA's paper calls it: fixed min-max grids, and Wanda on the weights on them."""
    block, in_turn = MlpBlock(), {}
    for name, weight_OD in block.weights.items():
        on_grid_OD = quantised(
            weight_OD, torch.ones(2, len(weight_OD), FOUR_BITS.num_grids(weight_OD.shape[1])), FOUR_BITS
        )
        scores_OD = reference.wanda_scores(on_grid_OD, block.inputs(name))
        in_turn[name] = on_grid_OD * reference.keep_in_rows(scores_OD, weight_OD.shape[1] // 2)
    learnt = {name: written(linear) for name, linear in joint(granularity).items()}
    assert error_of(learnt) < 0.95 * error_of(in_turn)


def test_strengths_move_and_are_noted() -> None:
    for linear in joint("row").values():
        assert linear.notes["bits"] == 4
        for end in ("clip_low_mean", "clip_high_mean"):
            assert 0.5 < linear.notes[end] < 1
            assert abs(linear.notes[end] - 0.98201) > 1e-4


def test_a_mix_of_patterns_is_quantised_too() -> None:
    besa = Besa(mix=True, quantize=FOUR_BITS)
    pruned = besa.prune(MlpBlock(), SemiStructured(keep=2, group=4), lambda figures: None).linears
    for linear in pruned.values():
        assert ((written(linear) != 0) <= linear.keep_OD).all()
        assert all(len(grid.unique()) <= 16 for grid in written(linear).reshape(-1, 20))


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(("options", "field"), [({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"group": 1}, "group")])
def test_grids_that_cannot_be_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){field}.*Input should be"):
        Quantize.model_validate(options)
