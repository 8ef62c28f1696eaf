"""The scores of other methods, each against a plain loop over its formula."""

from fractions import Fraction
from statistics import mean, stdev, variance

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.methods.structured.baselines import (
    Pool,
    flap_pools,
    fluctuation,
    keep_of_pools,
    standardised,
    two_ssp_split,
    wanda_sp,
)
from pipeline.statistics import Moments
from tests.correlated import distance, inputs, normal, squares_of


def test_wanda_sp_averages_wandas_scores_over_rows_and_sums_them_over_a_head() -> None:
    weight_OD, x_TD = normal(5, 12), inputs(12, 30)
    by_hand = [
        sum(mean(abs(weight_OD[i, j].item()) for i in range(5)) * x_TD[:, j].norm().item() for j in range(u, u + 3))
        for u in range(0, 12, 3)
    ]
    found_U = wanda_sp(weight_OD, squares_of(x_TD).squares_D, unit_size=3)
    assert found_U.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_flap_weighs_a_column_by_how_much_its_input_varies() -> None:
    weight_OD, x_TD = normal(5, 12), inputs(12, 30) + 3
    moments = Moments.empty(12, x_TD.device)
    moments.update(x_TD)
    by_hand = [
        variance(x_TD[:, j].tolist()) * 29 / 30 * sum(w * w for w in weight_OD[:, j].tolist()) for j in range(12)
    ]
    assert fluctuation(weight_OD, moments.variance_D).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_a_feature_that_never_varies_costs_flap_nothing_however_large() -> None:
    x_TD = inputs(12, 30).index_fill_(1, torch.tensor([7]), 100.0)
    moments = Moments.empty(12, x_TD.device)
    moments.update(x_TD)
    assert fluctuation(normal(5, 12), moments.variance_D).argmin().item() == 7


def test_scores_are_standardised_by_the_book() -> None:
    score_D = normal(20).double()
    values = score_D.tolist()
    by_hand = [(value - mean(values)) / stdev(values) for value in values]
    assert standardised(score_D).tolist() == pytest.approx(by_hand)
    assert standardised(torch.full((4,), 3.0)).tolist() == [0.0] * 4


def test_heads_of_flap_are_squared_standardised_and_averaged() -> None:
    heads, neurons = [normal(8, seed=s).abs() for s in (1, 2)], [normal(6, seed=s).abs() for s in (3, 4)]
    by_head, by_neuron = flap_pools(heads, neurons, head_size=4, head_numel=512, neuron_numel=3)
    assert distance(by_head.score_BU[1, 0], standardised(heads[1].square())[:4].mean()) < 1e-6
    assert torch.equal(by_neuron.score_BU[0], standardised(neurons[0]))
    assert (by_head.unit_numel, by_neuron.unit_numel) == (512, 3)


def test_units_of_all_blocks_compete_and_weigh_what_they_hold() -> None:
    heads = Pool(score_BU=torch.tensor([[9.0, 1.0], [8.0, 2.0]]), unit_numel=4)
    neurons = Pool(score_BU=torch.tensor([[7.0, 0.0, 6.0, 5.0], [9.5, 4.0, 3.0, 0.5]]), unit_numel=1)
    keep_heads, keep_neurons = keep_of_pools([heads, neurons], ratio=0.5)  # 12 of 24 stay
    assert keep_heads.tolist() == [[True, False], [True, False]]
    assert keep_neurons.tolist() == [[True, False, True, True], [True, False, False, False]]
    keep_heads, keep_neurons = keep_of_pools([heads, neurons], ratio=0.125)  # 21 of 24 stay: 22 come nearest
    assert keep_heads.all()
    assert keep_neurons.tolist() == [[True, False, True, True], [True, True, True, False]]


def test_every_block_keeps_its_best_of_each_kind() -> None:
    pool = Pool(score_BU=torch.tensor([[9.0, 8.0, 7.0], [0.0, 2.0, 1.0]]), unit_numel=1)
    assert keep_of_pools([pool], ratio=0.6)[0].tolist() == [[True, False, False], [False, True, False]]
    assert keep_of_pools([pool], ratio=1.0)[0].tolist() == [[True, False, False], [False, True, False]]


@pytest.mark.parametrize(
    ("percent", "mlp", "attention", "num_attentions"),
    # LLaMA-2-7B: 32 blocks, p_mlp / p_attention = 135.3e6 / 67.1e6, so the exponent is 1.344
    [(25, 135_266_304, 67_108_864, round(32 * 0.25**1.34375)), (50, 135_266_304, 67_108_864, 13), (0, 2, 1, 0)],
)
def test_two_ssp_splits_by_its_rule_and_neurons_make_up_the_rest(
    percent: int, mlp: int, attention: int, num_attentions: int
) -> None:
    ratio = Fraction(percent, 100)
    found, share = two_ssp_split(ratio, num_blocks=32, mlp_numel=mlp, attention_numel=attention)
    assert found == num_attentions
    assert found * attention + share * 32 * mlp == ratio * 32 * (mlp + attention)


def test_two_ssp_refuses_what_there_is_not() -> None:
    message = r"2SSP's split of 90\.0% over 4 blocks takes 0 attentions and 171\.0% .* may lose, 90%; .* larger `alpha`"
    with pytest.raises(ConfigError, match=message):
        two_ssp_split(Fraction(9, 10), num_blocks=4, mlp_numel=10, attention_numel=9, alpha=0.04)
