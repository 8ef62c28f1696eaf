"""A mask that comes little by little: exact counts in the end, nothing at first, a cubic between, better blocks."""

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods.gradual import NUM_STAGES, GradualMask
from pipeline.methods.reconstruct import Reconstruct
from pipeline.sparsity import SemiStructured, Sparsity, keep_highest_in_groups
from pipeline.statistics import AnyStatistic, ColumnSquares
from tests.numerics.test_reconstruct import FEATURES, HALF, MaskedMlp, masked, new_weights, normal

NUM_UPDATES = 80


def random_mask(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows that keep different numbers of weights."""
    return normal(rows, columns, seed=seed) > normal(rows, 1, seed=seed + 1)


def numbers_gone(mask: GradualMask, weight_OD: torch.Tensor, update: int) -> list[int]:
    mask.follow({"linear": weight_OD}, update)
    return (~mask.keep["linear"]).sum(dim=1).tolist()


def lowest_kept_out(weight_D: torch.Tensor, norm_D: torch.Tensor, count: int) -> set[int]:
    """Plainly: the columns with the lowest scores."""
    scores = (weight_D.double().abs() * norm_D.double()).tolist()
    return set(sorted(range(len(scores)), key=lambda column: scores[column])[:count])


def test_weights_go_along_a_cubic_each_row_as_many_as_it_is_to_lose() -> None:
    wanted, weight_OD, norm_D = random_mask(6, 40, seed=0), normal(6, 40, seed=5), normal(40, seed=6).abs()
    mask = GradualMask({"linear": wanted}, {"linear": norm_D}, None, NUM_UPDATES)
    for update in range(NUM_UPDATES):
        stage = min(NUM_STAGES, floor(NUM_STAGES * update / (NUM_UPDATES / 2)))
        part = 1 - (1 - stage / NUM_STAGES) ** 3
        counts = [floor(int(count) * part) for count in (~wanted).sum(dim=1)]
        assert numbers_gone(mask, weight_OD, update) == counts
        for row in range(6):
            gone = set((~mask.keep["linear"][row]).nonzero().flatten().tolist())
            assert gone == lowest_kept_out(weight_OD[row], norm_D, counts[row])
    assert mask.is_settled
    assert torch.equal(mask.keep["linear"].sum(dim=1), wanted.sum(dim=1))


def test_a_mask_that_is_settled_follows_no_more() -> None:
    wanted, norm_D = random_mask(4, 16, seed=0), torch.ones(16)
    mask = GradualMask({"linear": wanted}, {"linear": norm_D}, None, NUM_UPDATES)
    mask.follow({"linear": normal(4, 16, seed=1)}, NUM_UPDATES // 2)
    settled = mask.keep["linear"].clone()
    mask.follow({"linear": normal(4, 16, seed=2)}, NUM_UPDATES - 1)
    assert torch.equal(mask.keep["linear"], settled)


@given(update=st.integers(0, NUM_UPDATES), pattern=st.sampled_from([(2, 4), (4, 8), (1, 4)]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_within_groups_no_more_than_the_pattern_ever_goes(update: int, pattern: tuple[int, int], seed: int) -> None:
    keep, group = pattern
    weight_OD, norm_D = normal(5, 4 * group, seed=seed), normal(4 * group, seed=seed + 1).abs()
    wanted = keep_highest_in_groups(normal(5, 4 * group, seed=seed + 2), SemiStructured(keep=keep, group=group))
    mask = GradualMask({"linear": wanted}, {"linear": norm_D}, group, NUM_UPDATES)
    mask.follow({"linear": weight_OD}, update)
    kept = mask.keep["linear"].view(-1, group).sum(dim=1)
    assert (kept >= keep).all()
    assert mask.is_settled is (update >= NUM_UPDATES // 2)
    if mask.is_settled:
        best = keep_highest_in_groups(weight_OD.abs() * norm_D, SemiStructured(keep=keep, group=group))
        assert torch.equal(mask.keep["linear"], best)


def test_a_mix_of_patterns_stays_the_mix() -> None:
    scores = normal(2, 16, seed=0)
    wanted = torch.stack([
        keep_highest_in_groups(scores[:1], SemiStructured(keep=1, group=4))[0],
        keep_highest_in_groups(scores[1:], SemiStructured(keep=3, group=4))[0],
    ])  # fmt: skip
    mask = GradualMask({"linear": wanted}, {"linear": torch.ones(16)}, 4, NUM_UPDATES)
    mask.follow({"linear": normal(2, 16, seed=1)}, NUM_UPDATES)
    assert mask.keep["linear"].view(2, 4, 4).sum(dim=2).tolist() == [[1] * 4, [3] * 4]


class KnownInputs(MaskedMlp):
    """The block of the tests of reconstruct, its input norms known."""

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        assert kind is ColumnSquares
        inputs = self.hidden_BTD.flatten(0, 1)
        squares = ColumnSquares.empty(FEATURES if name == "up" else self.weights["up"].shape[0], torch.device("cpu"))
        squares.update(inputs if name == "up" else (inputs @ self.weights["up"].T).relu())
        assert isinstance(squares, kind)
        return squares


PATIENT = {"epochs": 30, "rate": 0.02, "target": "pruned"}


def prune(step: Reconstruct, sparsity: Sparsity = HALF) -> tuple[KnownInputs, dict[str, torch.Tensor]]:
    block = KnownInputs()
    made = step.prune(block, sparsity, lambda figures: None)
    for name, linear in made.linears.items():
        assert torch.equal(linear.keep_OD.sum(dim=1), block.so_far[name].keep_OD.sum(dim=1))
        assert not new_weights(made)[name][~linear.keep_OD].any()
    return block, new_weights(made)


def test_a_block_pruned_gradually_comes_nearer_to_the_dense_one_than_under_a_mask_that_was_there_at_once() -> None:
    everything = slice(0, 16)
    block, at_once = prune(Reconstruct.model_validate(PATIENT))
    _, gradually = prune(Reconstruct.model_validate({**PATIENT, "gradual": True}))
    assert block.error(gradually, everything, "pruned") < 0.7 * block.error(at_once, everything, "pruned")


@pytest.mark.parametrize("held_out", [0, 0.125])
def test_no_pass_counts_before_the_mask_is_settled(held_out: float) -> None:
    told: list[float] = []
    block = KnownInputs()
    step = Reconstruct(epochs=4, gradual=True, target="pruned", held_out=held_out, rate=0.02)
    made = step.prune(block, HALF, lambda figures: told.append(figures.get("held_out", figures["error"])))
    notes = made.linears["up"].notes
    settled = told[2:]  # the mask stands still after half of four passes
    assert notes["error_after"] == pytest.approx(min(settled) if held_out else settled[-1])


def test_where_learning_makes_nothing_better_mask_and_values_stay_those_that_came_in() -> None:
    block = KnownInputs()
    made = Reconstruct(epochs=2, rate=1e3, gradual=True, target="pruned").prune(block, HALF, lambda figures: None)
    for name, linear in made.linears.items():
        assert torch.equal(linear.keep_OD, block.so_far[name].keep_OD)
        assert torch.equal(new_weights(made)[name], masked(block)[name])


def test_one_update_is_enough_for_the_mask_to_settle() -> None:
    block = KnownInputs(num_sequences=1)
    made = Reconstruct(epochs=1, gradual=True, target="pruned").prune(block, HALF, lambda figures: None)
    assert made.linears["up"].notes["epochs"] == 1


def test_it_asks_for_input_norms_only_when_it_chooses() -> None:
    assert Reconstruct().statistics == ()
    assert Reconstruct(gradual=True).statistics == (ColumnSquares,)
