"""Heads that go by a metric, and what makes up for them: held against formulas worked out plainly in float64."""

from itertools import combinations

import pytest
import torch

from pipeline.attention import HeadLayout, HeadUnit
from pipeline.methods.structured.narrowing import Comp, CutBlock, Narrowing, Units
from pipeline.methods.structured.published import Flap
from pipeline.statistics import Gathered
from tests import removal
from tests.numerics.test_narrowing import ReaderBlock, ReplicaBlock, gathered, squared_error
from tests.replicas import ThreadPeer, together

LAYOUT = HeadLayout(num_heads=6, num_groups=3, head_dim=4)
UNITS = pytest.mark.parametrize("unit", ["group", "query"])
FITTED = slice(0, 14)


def asked(unit: HeadUnit, statistics: Gathered, num_fitted: int = 14) -> Units:
    """One group goes, or one query head of each."""
    num_pools = LAYOUT.num_pools(unit)
    return Units(
        reader="down", unit_size=LAYOUT.unit_size(unit), num_pools=num_pools,
        num_kept=(LAYOUT.per_pool(unit) - 1) * num_pools, gathered=statistics, num_fitted=num_fitted,
    )  # fmt: skip


def cut(step: Narrowing, unit: HeadUnit, block: ReaderBlock) -> CutBlock:
    return step.cut(block, asked(unit, gathered(block.hidden_BTD[FITTED])), lambda figures: None)


def features(keep_U: torch.Tensor, unit: HeadUnit) -> torch.Tensor:
    return keep_U.repeat_interleave(LAYOUT.unit_size(unit))


@UNITS
@pytest.mark.parametrize("metric", ["forward", "wanda_sp", "flap"])
def test_a_heads_score_is_made_of_those_of_its_features(metric: str, unit: HeadUnit) -> None:
    block = ReaderBlock()
    made = cut(Comp.model_validate({"neuron_metric": metric, "recovery": "none"}), unit, block)
    x_TD, weight_OD = block.hidden_BTD[FITTED].flatten(0, 1).double(), block.weights["down"].double()
    size, scores = LAYOUT.unit_size(unit), []
    for start in range(0, 24, size):
        x_Ts, w_Os = x_TD[:, start : start + size], weight_OD[:, start : start + size]
        if metric == "forward":  # what the head carries to the output
            scores.append((x_Ts @ w_Os.T).norm())
        elif metric == "wanda_sp":
            scores.append((w_Os.abs().mean(dim=0) * x_Ts.norm(dim=0)).sum())
        else:
            scores.append((x_Ts.var(dim=0) * w_Os.square().sum(dim=0)).square().mean())
    score_PV = torch.stack(scores).view(LAYOUT.num_pools(unit), -1)
    lowest = score_PV.argmin(dim=1)
    assert (~made.keep_U).view_as(score_PV).nonzero()[:, 1].tolist() == lowest.tolist()


@UNITS
def test_the_heads_that_go_first_are_those_that_the_others_can_make_up_for(unit: HeadUnit) -> None:
    block = ReaderBlock()
    made = cut(Comp(rounds=1, damping=1e-9, mask_var_max=100.0, recovery="none"), unit, block)
    a_NU = removal.carried(block.weights["down"], block.hidden_BTD[FITTED].flatten(0, 1), LAYOUT.unit_size(unit))
    rises_PV = removal.rises(a_NU).view(LAYOUT.num_pools(unit), -1)
    gone = (~made.keep_U).view_as(rises_PV).nonzero()[:, 1]
    assert gone.tolist() == rises_PV.argmin(dim=1).tolist()
    if unit == "group":  # one goes: by brute force no other choice, each with its best mask, errs less
        errors = {pair: removal.least_error(a_NU, pair) for pair in combinations(range(3), 1)}
        assert min(errors, key=errors.__getitem__) == (int(gone),)


@UNITS
def test_columns_of_a_head_are_rescaled_as_one_and_as_brute_force_finds(unit: HeadUnit) -> None:
    block = ReaderBlock()
    made = cut(Comp(rounds=1, damping=1e-9, mask_var_max=100.0), unit, block)
    assert made.folded_OK is not None
    keep_D, size = features(made.keep_U, unit), LAYOUT.unit_size(unit)
    factor_KS = (made.folded_OK / block.weights["down"][:, keep_D]).T.reshape(-1, size * 12)
    assert (factor_KS - factor_KS[:, :1]).abs().max() < 1e-5
    a_NU = removal.carried(block.weights["down"], block.hidden_BTD[FITTED].flatten(0, 1), size)
    gone = (~made.keep_U).nonzero()[:, 0].tolist()
    kept_a_NK = a_NU[:, made.keep_U]
    ridges = [damping * kept_a_NK.square().sum(dim=0).mean().item() for damping in (1e-9, 0.01, 0.1, 0.5, 1.0)]
    candidates = [removal.best_mask(a_NU, gone, ridge)[made.keep_U] for ridge in ridges]
    assert min((factor_KS[:, 0] - mask_K).abs().max().item() for mask_K in candidates) < 1e-5


@UNITS
def test_least_squares_over_a_heads_columns_is_the_textbooks(unit: HeadUnit) -> None:
    block = ReaderBlock()
    made = cut(Comp(recovery="lstsq"), unit, block)
    assert made.folded_OK is not None
    keep_D, damping = features(made.keep_U, unit), made.notes["recovery_damping"]
    x_TD, weight_OD = block.hidden_BTD[FITTED].flatten(0, 1).double(), block.weights["down"].double()
    x_TK = x_TD[:, keep_D]
    ridge = damping * x_TK.square().sum(dim=0).mean()
    stacked = torch.cat([x_TK, ridge.sqrt() * torch.eye(x_TK.shape[1], dtype=torch.float64)])
    target = torch.cat([x_TD @ weight_OD.T, ridge.sqrt() * weight_OD[:, keep_D].T])
    expected_KO = torch.linalg.lstsq(stacked, target).solution
    assert (made.folded_OK.T - expected_KO).abs().max() < 1e-5 * expected_KO.abs().max()


@UNITS
@pytest.mark.parametrize("recovery", ["mask", "lstsq"])
def test_what_is_left_errs_less_on_held_out_sequences_mended_than_not(recovery: str, unit: HeadUnit) -> None:
    block, held_out = ReaderBlock(), slice(14, 16)
    none, mended = (cut(Comp.model_validate({"recovery": name}), unit, block) for name in ("none", recovery))
    assert torch.equal(none.keep_U, mended.keep_U)
    errors = []
    for made in (none, mended):
        by_feature = CutBlock(keep_U=features(made.keep_U, unit), folded_OK=made.folded_OK)
        errors.append(squared_error(block, by_feature, held_out))
    assert errors[1] < errors[0]


@UNITS
def test_all_replicas_end_with_the_same_heads_and_bits(unit: HeadUnit) -> None:
    shares = [slice(0, 3), slice(3, 11), slice(11, 16)]
    step = Comp(recovery="lstsq")
    fitted = [ReaderBlock().hidden_BTD[s][: step.num_fitted(s.stop - s.start)] for s in shares]

    def work(peer: ThreadPeer) -> CutBlock:
        neurons = asked(unit, gathered(*fitted), num_fitted=len(fitted[peer.rank]))
        return step.cut(ReplicaBlock(peer, shares), neurons, lambda figures: None)

    first, *others = together(len(shares), work)
    assert first.folded_OK is not None
    for other in others:
        assert torch.equal(first.keep_U, other.keep_U)
        assert other.folded_OK is not None
        assert torch.equal(first.folded_OK, other.folded_OK)


def test_a_bias_cannot_make_up_for_heads() -> None:
    with pytest.raises(ValueError, match=r"`recovery: bias` makes up for neurons alone, .* or leave `heads` out"):
        Flap(heads=0.5)
    assert Flap(heads=0.5, recovery="none").heads == 0.5


@pytest.mark.parametrize(("wide", "largest"), [((8, 100), (8, 100)), ((8, 20), (8, 60))])
def test_what_works_on_heads_and_neurons_in_turn_takes_what_the_larger_of_them_does(
    wide: tuple[int, int], largest: tuple[int, int]
) -> None:
    shapes, groups = {"qkv": (60, 8), "o": wide, "up": (60, 8), "down": (8, 60)}, [["qkv"], ["o"], ["up"], ["down"]]
    alone = Comp().working_bytes({**shapes, "down": largest}, groups, torch.float32)
    assert Comp(heads=0.5).working_bytes(shapes, groups, torch.float32) == alone
