"""Widths of blocks, as one number or as many, and what transformers' configurations say of them."""

from typing import Any

import pytest
from transformers import LlamaConfig

from pipeline.block_widths import (
    each_width,
    level,
    settings_by_block,
    take_widths,
    width_at,
    width_in_words,
    widths_written,
)
from pipeline.errors import UnsupportedCheckpoint

THREE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}


def config_of(by_block: dict[str, dict[str, Any]] | None) -> LlamaConfig:
    return LlamaConfig(**THREE, per_layer_config=by_block)


def test_a_width_is_that_of_every_block_or_of_each() -> None:
    assert (width_at(8, 2), width_at((8, 9, 7), 2)) == (8, 7)
    assert (each_width(8, 3), each_width((8, 9, 7), 3)) == ((8, 8, 8), (8, 9, 7))
    assert (level([8, 9, 8]), level([8, 8])) == ((8, 9, 8), 8)
    assert (width_in_words(1120), width_in_words((9, 8, 1200)), width_in_words([7, 8])) == (
        "1,120", "8 to 1,200", "7 to 8",
    )  # fmt: skip


def test_what_is_written_is_what_transformers_reads() -> None:
    written = settings_by_block((20, 48, 30))
    config = config_of(written)  # type: ignore[arg-type]
    assert [block.intermediate_size for block in config.per_layer_config] == [20, 48, 30]
    assert widths_written({"per_layer_config": written, "intermediate_size": 48}) == (20, 48, 30)
    assert widths_written({"intermediate_size": 48}) is None


def test_widths_taken_out_leave_a_configuration_of_blocks_alike() -> None:
    config = config_of({"1": {"intermediate_size": 20}})
    assert take_widths(config) == (48, 20, 48)
    assert not config.is_heterogeneous
    assert config.intermediate_size == 48
    assert take_widths(config) is None


def test_blocks_that_are_alike_for_all_that_is_said_of_them_have_no_widths_of_their_own() -> None:
    config = config_of({"0": {"intermediate_size": 48}})
    assert take_widths(config) is None
    assert not config.is_heterogeneous


@pytest.mark.parametrize(
    ("by_block", "named"),
    [({"0": {"num_key_value_heads": 2}}, "num_key_value_heads"), ({"2": {"skip": ["mlp"]}}, "skip")],
)
def test_other_settings_of_single_blocks_are_refused(by_block: dict[str, dict[str, Any]], named: str) -> None:
    config = config_of(by_block | {"1": {"intermediate_size": 20}})
    with pytest.raises(UnsupportedCheckpoint, match=rf"gives single blocks {named} of their own .*; only intermediate"):
        take_widths(config)
