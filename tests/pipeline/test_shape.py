"""What config.json says of a smaller model."""

from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from pipeline.attention import HeadLayout
from pipeline.errors import UnsupportedCheckpoint
from pipeline.shape import Shape, edited_settings, without_last

KEPT = Shape(kept=(0, 3, 5))
SIX = {"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 32}


def edited(config: PretrainedConfig, **written: Any) -> dict[str, Any]:
    return dict(edited_settings(config, written, KEPT))


def test_only_what_the_shape_changes_is_changed() -> None:
    written = {"num_hidden_layers": 6, "torch_dtype": "bfloat16", "unknown": [1, 2, 3, 4, 5, 6]}
    assert edited(LlamaConfig(**SIX), **written) == written | {"num_hidden_layers": 3}


def test_the_number_of_blocks_goes_by_the_name_that_the_family_gives_it() -> None:
    assert edited(GPT2Config(n_layer=6), n_layer=6, n_embd=32) == {"n_layer": 3, "n_embd": 32}
    assert edited(GPT2Config(n_layer=6), num_hidden_layers=6) == {"n_layer": 3}


def test_biases_and_neurons_are_told_where_they_change() -> None:
    written = {"intermediate_size": 48, "mlp_bias": False}
    shape = Shape(kept=(0, 3), width=40, mlp_bias=True)
    assert edited_settings(LlamaConfig(**SIX), written, shape) == {
        "intermediate_size": 40, "mlp_bias": True, "num_hidden_layers": 2
    }  # fmt: skip


def test_lists_by_block_are_sliced_and_those_that_a_rule_makes_are_written_out() -> None:
    windows = Qwen2Config(**SIX, use_sliding_window=True, sliding_window=8, max_window_layers=4)
    kinds = edited(windows, max_window_layers=4)["layer_types"]
    assert kinds == ["full_attention", "full_attention", "sliding_attention"]
    alternating = ["sliding_attention", "full_attention", "full_attention"] * 2
    listed = edited(Gemma3TextConfig(**SIX, layer_types=alternating), layer_types=alternating)["layer_types"]
    assert listed == [alternating[block] for block in KEPT.kept]


def test_heads_that_are_left_are_written_as_stock_transformers_takes_them() -> None:
    two = Shape(kept=(0, 3, 5), width=8, heads=HeadLayout(num_heads=2, num_groups=1, head_dim=8))
    found = edited_settings(LlamaConfig(**SIX), SIX, two)
    assert found == {
        **SIX, "num_hidden_layers": 3, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8,
    }  # fmt: skip


def test_a_list_of_another_length_is_refused() -> None:
    config = LlamaConfig(**SIX)
    config.layer_types = ["full_attention"] * 5
    with pytest.raises(UnsupportedCheckpoint, match=r"5 layer_types for 6 blocks, .*: correct the list"):
        edited(config)


def test_a_shape_survives_as_plain_data_and_knows_what_is_gone() -> None:
    biased, uneven = Shape(kept=(0, 1), width=8, mlp_bias=True, silent=(1,)), Shape(kept=(0, 1), width=(8, 9))
    headless = Shape(kept=(0,), width=8, heads=HeadLayout(num_heads=3, num_groups=1, head_dim=8))
    for shape in (KEPT, Shape(kept=(0, 1), width=8), biased, uneven, headless):
        assert Shape.from_data(shape.as_data()) == shape
    assert KEPT.dropped(6) == (1, 2, 4)


def test_widths_of_single_blocks_stand_beside_that_of_the_dense_model() -> None:
    shape = Shape(kept=(0, 5), width=(20, 30))
    found = edited_settings(LlamaConfig(**SIX, intermediate_size=48), {"intermediate_size": 48}, shape)
    by_block = {"0": {"intermediate_size": 20}, "1": {"intermediate_size": 30}}
    assert found == {"num_hidden_layers": 2, "intermediate_size": 48, "per_layer_config": by_block}


def test_any_shape_of_a_size_keeps_both_ends() -> None:
    assert without_last(6, 2) == Shape(kept=(0, 1, 2, 5))
    assert without_last(6, 4) == Shape(kept=(0, 5))
