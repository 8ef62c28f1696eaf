"""BESA on a small block: it learns where to prune, meets the budget to the weight, and touches nothing else."""

from collections.abc import Mapping
from functools import cache
from typing import Literal

import pytest
import torch
from prodigyopt import Prodigy

from pipeline.errors import NumericsError
from pipeline.lazy_weights import Maker
from pipeline.methods.besa import Besa, block_sparsity
from pipeline.methods.learnable import Learnable, learnable
from pipeline.methods.row_sparsity import shares, tilt_towards
from pipeline.methods.step import NOTHING, PrunedLinear
from pipeline.sparsity import Unstructured
from pipeline.statistics import AnyStatistic, ColumnSquares
from pipeline.stream_names import StreamName
from tests import reference
from tests.blocks import SmallBlock

Granularity = Literal["row", "linear"]
Weights = Mapping[str, torch.Tensor]
Figures = list[Mapping[str, float]]
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "linear"])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NUM_WEIGHTS = 2 * 40 * 80


class MlpBlock(SmallBlock):
    """A `BlockView`: y = x + relu(x up^T) down^T on 16 sequences of 12 tokens, 40 features, 80 hidden units.

    What can be spared is uneven: from half of the weights of the first row of `up` to nearly all of its last are
    specks, while those of `down` are all alike.
    """

    def __init__(self) -> None:
        self.hidden_BTD = normal(16, 12, 40, seed=0)
        specks_OD = normal(80, 40, seed=1).abs() < torch.linspace(0.7, 2.0, 80)[:, None]
        self.weights: Weights = {
            "up": normal(80, 40, seed=2) * torch.where(specks_OD, 1e-3, 1.0),
            "down": 0.3 * normal(40, 80, seed=3),
        }
        self._inputs = {"up": self.hidden_BTD, "down": self._hidden_units(self.weights["up"], self.hidden_BTD)}

    @staticmethod
    def _hidden_units(up_OD: torch.Tensor, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return (hidden_BTD @ up_OD.T).relu()

    def inputs(self, name: str) -> torch.Tensor:
        return self._inputs[name].flatten(0, 1)

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        statistic = kind.empty(self._inputs[name].shape[-1], torch.device("cpu"))
        statistic.update(self.inputs(name))
        return statistic

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        return self.output_with({name: make() for name, make in weights.items()}, sequences)

    def output_with(self, weights: Weights, sequences: slice) -> torch.Tensor:
        hidden_BTD = self.hidden_BTD[sequences]
        return hidden_BTD + self._hidden_units(weights["up"], hidden_BTD) @ weights["down"].T

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        return self.output_with(self.weights, sequences)


class BrokenBlock(MlpBlock):
    """A block whose dense output overflowed."""

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        return super().target(sequences, stream).index_fill(2, torch.tensor([4]), torch.inf)


def prune(besa: Besa, percent: int, block: MlpBlock | None = None) -> tuple[dict[str, PrunedLinear], Figures]:
    figures: Figures = []
    pruned = besa.prune(block or MlpBlock(), Unstructured(ratio=percent / 100), figures.append).linears
    return pruned, figures


@cache
def trained(granularity: Granularity, percent: int) -> tuple[dict[str, PrunedLinear], Figures]:
    """A run of default options but for the granularity, shared by the tests that only look at its result."""
    return prune(Besa(granularity=granularity), percent)


def error_under(keep: Mapping[str, torch.Tensor], block: MlpBlock) -> float:
    everything = slice(0, block.num_sequences)
    pruned = {name: block.weights[name] * keep[name] for name in keep}
    return reference.relative_error(block.output_with(pruned, everything), block.target(everything, "pruned"))


def uniform_wanda(block: MlpBlock, percent: int) -> dict[str, torch.Tensor]:
    return {
        name: reference.keep_in_rows(
            reference.wanda_scores(weight_OD, block.inputs(name)), percent * weight_OD.shape[1] // 100
        )
        for name, weight_OD in block.weights.items()
    }


@GRANULARITIES
@pytest.mark.parametrize("percent", [5, 30, 50, 70, 95])
def test_the_block_loses_exactly_its_budget(granularity: Granularity, percent: int) -> None:
    pruned, _ = trained(granularity, percent)
    assert sum((~linear.keep_OD).sum().item() for linear in pruned.values()) == percent * NUM_WEIGHTS // 100


@GRANULARITIES
@pytest.mark.parametrize("percent", [50, 70])
def test_the_block_errs_less_than_under_wanda_at_the_same_sparsity(granularity: Granularity, percent: int) -> None:
    pruned, _ = trained(granularity, percent)
    learnt = error_under({name: linear.keep_OD for name, linear in pruned.items()}, MlpBlock())
    uniform = error_under(uniform_wanda(MlpBlock(), percent), MlpBlock())
    assert learnt < 0.95 * uniform


@GRANULARITIES
def test_what_can_be_spared_is_pruned_harder(granularity: Granularity) -> None:
    pruned, _ = trained(granularity, 50)
    assert pruned["up"].keep_OD.float().mean() < pruned["down"].keep_OD.float().mean()


def test_rows_of_specks_are_pruned_harder_than_their_neighbours() -> None:
    kept_O = trained("row", 50)[0]["up"].keep_OD.float().mean(dim=1)
    assert kept_O[-20:].mean() < kept_O[:20].mean()


@GRANULARITIES
def test_rows_lose_their_lowest_wanda_scores_only(granularity: Granularity) -> None:
    block = MlpBlock()
    for name, linear in trained(granularity, 50)[0].items():
        scores_OD = reference.wanda_scores(block.weights[name], block.inputs(name))
        for scores, keep in zip(scores_OD, linear.keep_OD, strict=True):
            assert torch.equal(keep, reference.keep_in_rows(scores[None], int((~keep).sum()))[0])


def test_rows_of_one_linear_drop_the_same_when_the_linear_learns() -> None:
    for linear in trained("linear", 50)[0].values():
        counts_O = (~linear.keep_OD).sum(dim=1)
        assert counts_O.max() - counts_O.min() <= 1


@GRANULARITIES
def test_weights_are_never_changed(granularity: Granularity) -> None:
    block = MlpBlock()
    pruned, _ = prune(Besa(granularity=granularity), 50, block)
    fresh = MlpBlock()
    assert all(torch.equal(block.weights[name], fresh.weights[name]) for name in fresh.weights)
    assert all(linear.weight_OD is None for linear in pruned.values())


@GRANULARITIES
def test_two_runs_are_one(granularity: Granularity) -> None:
    again, figures = prune(Besa(granularity=granularity), 50)
    first, first_figures = trained(granularity, 50)
    assert all(torch.equal(again[name].keep_OD, first[name].keep_OD) for name in first)
    assert figures == first_figures


@GRANULARITIES
@pytest.mark.parametrize("percent", [30, 50, 70])
def test_it_starts_at_the_target_from_wandas_error_without_penalty(granularity: Granularity, percent: int) -> None:
    """Rows of 40 and 80 can drop 30, 50 and 70 percent exactly, so the first mask is uniform Wanda's."""
    _, figures = prune(Besa(granularity=granularity, batch=16), percent)
    first = figures[0]
    assert first["sparsity"] == pytest.approx(percent / 100, abs=1e-6)
    assert first["error"] == pytest.approx(error_under(uniform_wanda(MlpBlock(), percent), MlpBlock()), rel=1e-5)
    penalty = 5 * ((first["sparsity"] - percent / 100) / (percent / 100)) ** 2
    assert penalty < 1e-10


def textbook_descent(block: MlpBlock, target: float, num_updates: int) -> list[tuple[float, float]]:
    """Return (error, sparsity) before every update, one sequence each, with masks and loss written out in full."""
    ranks = {n: reference.ranks_in_rows(reference.wanda_scores(w, block.inputs(n))) for n, w in block.weights.items()}
    thetas = {n: torch.zeros(len(w), 101, requires_grad=True) for n, w in block.weights.items()}
    optimizer = Prodigy(list(thetas.values()), lr=1.0, d0=0.05, d_coef=5.0)
    figures = []
    for i in range(num_updates):
        optimizer.zero_grad()
        masked, num_pruned = {}, torch.zeros(())
        for name, weight_OD in block.weights.items():
            share_GP = shares(thetas[name], tilt_towards(target, torch.device("cpu")), 1.0)
            wanted_G = share_GP @ (torch.arange(101) / 100) * weight_OD.shape[1]
            masked[name] = reference.straight_through_weight(share_GP, weight_OD, ranks[name], wanted_G.floor())
            num_pruned = num_pruned + wanted_G.sum()
        output, expected = block.output_with(masked, slice(i, i + 1)), block.target(slice(i, i + 1), "pruned")
        error = ((output - expected).square().sum(dim=(0, 1)) / expected.square().sum(dim=(0, 1))).mean()
        sparsity = num_pruned / NUM_WEIGHTS
        torch.autograd.backward(error + 5 * ((sparsity - target) / target) ** 2)
        optimizer.step()
        figures.append((error.item(), sparsity.item()))
    return figures


@pytest.mark.parametrize("percent", [31, 51, 69])
def test_the_descent_is_that_of_the_soft_masks_written_out(percent: int) -> None:
    """At these targets rows start far from whole counts, so rounding cannot make the two part at a floor."""
    _, figures = prune(Besa(batch=1, penalty=5.0, reach=1.0, growth=5.0), percent)
    expected = textbook_descent(MlpBlock(), percent / 100, num_updates=len(figures))
    assert [step["error"] for step in figures] == pytest.approx([error for error, _ in expected], rel=1e-3)
    assert [step["sparsity"] for step in figures] == pytest.approx([sparsity for _, sparsity in expected], rel=1e-4)
    assert figures[-1]["sparsity"] != pytest.approx(percent / 100, rel=1e-3)


def test_a_stiffer_penalty_keeps_the_block_closer_to_the_target() -> None:
    loose, stiff = (prune(Besa(penalty=penalty), 50)[1][-1]["sparsity"] for penalty in (1e-6, 1e3))
    assert abs(stiff - 0.5) < abs(loose - 0.5)


def test_every_update_is_reported_with_its_epoch() -> None:
    _, figures = prune(Besa(epochs=2, batch=3), 50)
    assert [step["epoch"] for step in figures] == [0] * 6 + [1] * 6  # 16 sequences in batches of 3
    assert all(0 <= step["sparsity"] <= 1 and step["error"] > 0 for step in figures)


@GRANULARITIES
def test_notes_tell_how_far_the_rows_moved(granularity: Granularity) -> None:
    for linear in trained(granularity, 50)[0].values():
        share_O = (~linear.keep_OD).double().mean(dim=1)
        assert linear.notes["row_sparsity_min"] == share_O.min().item()
        assert linear.notes["row_sparsity_max"] == share_O.max().item()


def test_a_loss_that_is_not_finite_stops_the_block() -> None:
    message = r"besa's loss became nan \(reconstruction error nan, block sparsity 0\.5\); hidden states of this block"
    with pytest.raises(NumericsError, match=message):
        prune(Besa(), 50, BrokenBlock())


def untrained(num_rows: int, num_columns: int, target: float) -> Learnable:
    weight_OD, norm_D = normal(num_rows, num_columns, seed=4), torch.ones(num_columns)
    return learnable("linear", weight_OD, norm_D, Unstructured(ratio=target), "row", 1.0, None)


def test_the_sparsity_of_a_block_weighs_its_linears_by_size() -> None:
    rows = [untrained(30, 10, 0.2), untrained(10, 10, 0.6)]
    shares_of = [r.shares() for r in rows]
    sparsity = block_sparsity(rows, shares_of)
    assert sparsity.item() == pytest.approx((300 * 0.2 + 100 * 0.6) / 400, abs=1e-6)
    for share_GP, part in zip(torch.autograd.grad(sparsity, shares_of), (300 / 400 / 30, 100 / 400 / 10), strict=True):
        assert torch.allclose(share_GP, (part * torch.arange(101) / 100).expand_as(share_GP), rtol=1e-5)


def test_its_statistic_is_wandas() -> None:
    assert Besa().statistics == (ColumnSquares,)
    assert not Besa.accepts_mask
