"""Where heads are in a block, for every family that is known, and which of them may go."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.anatomy import Cut, mlp_of
from pipeline.attention import HeadCut, HeadLayout, HeadUnit, attention_of, layout_of
from pipeline.errors import ConfigError
from tests.heads import OTHERS
from tests.tiny import FAMILIES

LAYOUT = HeadLayout(num_heads=4, num_groups=2, head_dim=2)
GROUP = LAYOUT.kept(torch.tensor([False, True]), "group")
QUERY = LAYOUT.kept(torch.tensor([False, True, True, False]), "query")
UNITS = st.sampled_from(("group", "query"))


def test_a_fused_matrix_loses_the_rows_of_a_head_in_each_of_its_unequal_parts() -> None:
    fused_OD, attention = torch.arange(16.0)[:, None].expand(16, 3), attention_of(FAMILIES["phi3"])
    assert attention.left("self_attn.qkv_proj.weight", fused_OD, GROUP)[:, 0].tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    left = attention.left("self_attn.qkv_proj.weight", fused_OD, QUERY)[:, 0].tolist()
    assert left == [2, 3, 4, 5, *range(8, 16)]


def test_rows_and_biases_of_makers_and_columns_of_the_reader_go() -> None:
    attention, queries, keys = attention_of(FAMILIES["qwen2"]), torch.arange(8.0), torch.arange(4.0)
    assert attention.left("self_attn.q_proj.bias", queries, QUERY).tolist() == [2, 3, 4, 5]
    assert attention.left("self_attn.k_proj.bias", keys, GROUP).tolist() == [2, 3]
    assert attention.left("self_attn.v_proj.weight", keys[:, None], QUERY)[:, 0].tolist() == [0, 1, 2, 3]
    assert attention.left("self_attn.o_proj.weight", queries[None], GROUP)[0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("own", ["self_attn.o_proj.bias", "self_attn.q_norm.weight", "mlp.down_proj.weight"])
def test_what_heads_are_no_matter_to_stays_as_it_is(own: str) -> None:
    tensor, attention = torch.zeros(8, 8), attention_of(FAMILIES["qwen3"])
    assert attention.left(own, tensor, GROUP) is tensor
    assert attention.num_gone(own, (8, 8), GROUP.remaining) == 0


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("unit", "keep_U"), [("group", [False, True]), ("query", [True, False, False, True])])
def test_what_goes_is_counted_as_it_is_taken_out(family: str, unit: HeadUnit, keep_U: list[bool]) -> None:
    attention = attention_of(FAMILIES[family])
    layout = attention.layout
    kept = layout.kept(torch.tensor(keep_U), unit)
    shapes = {f"{n}.weight": (sum(map(layout.rows, roles)), 32) for n, roles in attention.makers.items()}
    shapes["self_attn.o_proj.weight"] = (32, layout.rows("query"))
    left = {own: attention.left(own, torch.zeros(shape), kept).numel() for own, shape in shapes.items()}
    gone = {own: attention.num_gone(own, shape, kept.remaining) for own, shape in shapes.items()}
    assert {own: shape[0] * shape[1] - gone[own] for own, shape in shapes.items()} == left
    assert sum(gone.values()) == 2 * 8 * 32 * 2 + (unit == "group") * 2 * 8 * 32


def test_a_cut_of_both_leaves_heads_and_neurons_and_new_values_where_they_are_read() -> None:
    config, folded_OK = FAMILIES["llama"], torch.ones(3, 4)
    heads = HeadCut(attention=attention_of(config), kept=GROUP, folded_OK=folded_OK)
    cut = Cut(mlp=mlp_of(config), keep_U=torch.tensor([True, False]), heads=heads)
    assert cut.left("self_attn.o_proj.weight", torch.zeros(3, 8)) is folded_OK
    assert cut.left("self_attn.q_proj.weight", torch.zeros(8, 3)).shape == (4, 3)
    assert cut.left("mlp.down_proj.weight", torch.zeros(3, 2)).shape == (3, 1)
    assert [cut.folds(f"{name}.weight") for name in ("self_attn.o_proj", "mlp.down_proj")] == [True, False]
    assert cut.touches("self_attn.k_proj.bias")
    assert cut.touches("mlp.up_proj.weight")
    assert not cut.touches("input_layernorm.weight")


def test_what_a_config_leaves_out_follows_from_the_rest() -> None:
    assert layout_of(FAMILIES["llama"]) == HeadLayout(num_heads=4, num_groups=2, head_dim=8)
    assert layout_of(FAMILIES["phi3"]) == HeadLayout(num_heads=4, num_groups=2, head_dim=8)
    assert str(layout_of(FAMILIES["llama"])) == "4 query heads on 2 of keys and values"


@pytest.mark.parametrize("config", [FAMILIES["opt"], FAMILIES["gpt-neox"], OTHERS["h-olmo2"]], ids=str)
def test_a_family_that_is_not_known_is_refused_and_those_that_are_named(config: object) -> None:
    with pytest.raises(ConfigError, match=r"no heads can be .* only from that of gemma, gemma2, .*leave `heads` out"):
        attention_of(config)


@given(st.integers(2, 6), st.integers(2, 6), UNITS, st.fractions(0, 1))
def test_a_part_is_rounded_down_to_whole_units_and_one_stays(
    num_groups: int, per_group: int, unit: HeadUnit, beyond: Fraction
) -> None:
    layout = HeadLayout(num_heads=num_groups * per_group, num_groups=num_groups, head_dim=2)
    per_pool = layout.per_pool(unit)
    part = (1 + beyond * (per_pool - Fraction(101, 100))) / per_pool  # from one unit to just short of all
    num_pruned = layout.num_pruned(part, unit)
    assert num_pruned <= part * per_pool < num_pruned + 1
    left = layout.without(num_pruned, unit)
    assert left.num_heads >= left.num_groups >= 1
    assert (left.num_groups == num_groups) == (unit == "query")
    assert (left.heads_per_group == per_group) == (unit == "group")


@pytest.mark.parametrize(
    ("layout", "unit", "message"),
    [
        (LAYOUT, "group", r"heads: 0\.4 of 2 groups of heads is less than one, .*; ask for 0\.5 at least, or choose"),
        (LAYOUT, "query", r"heads: 0\.4 of 2 query heads of a group is less .* `head_unit: group` \(4 query heads"),
        (HeadLayout(num_heads=3, num_groups=3, head_dim=2), "query", r"of 1 query heads .*; the last one stays, or"),
    ],
)
def test_less_than_a_head_is_refused(layout: HeadLayout, unit: HeadUnit, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.num_pruned(Fraction(2, 5), unit)
