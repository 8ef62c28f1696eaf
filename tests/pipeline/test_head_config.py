"""What config.json says of fewer heads: stock transformers builds the model that was meant, or it is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig

from pipeline.attention import HeadLayout
from pipeline.errors import ConfigError
from pipeline.head_config import head_settings, require_loadable
from tests.heads import LLAMA3, OTHERS, WIDE
from tests.tiny import some_tokens

SIX = HeadLayout(num_heads=6, num_groups=3, head_dim=8)
FOUR = HeadLayout(num_heads=4, num_groups=4, head_dim=8)


def settings_of(config: PretrainedConfig, heads: HeadLayout, **written: Any) -> dict[str, Any]:
    return dict(head_settings(config, {**config.to_diff_dict(), **written}, heads))


def test_heads_that_divide_the_hidden_size_change_three_settings() -> None:
    config = LlamaConfig(**WIDE)
    written = config.to_diff_dict()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    assert settings_of(config, FOUR) == written | heads


@pytest.mark.parametrize("family", ["h-llama-wide", "h-llama-wide-rope"])
def test_a_llama_written_as_a_mistral_computes_the_same_to_the_bit(family: str) -> None:
    config = OTHERS[family]
    settings = settings_of(config, HeadLayout(num_heads=6, num_groups=3, head_dim=8))
    dense = {**settings, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mistral = AutoModelForCausalLM.from_config(MistralConfig.from_dict(dense), dtype=torch.float32).eval()
    mistral.load_state_dict(llama.state_dict())
    tokens = some_tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(mistral(tokens).logits, llama(tokens).logits)
    assert settings["model_type"] == "mistral"
    assert settings["architectures"] == ["MistralForCausalLM"]
    assert settings["sliding_window"] is None
    assert MistralConfig.from_dict(settings).rope_parameters == config.rope_parameters


def test_what_a_llama_leaves_to_defaults_is_written_out_where_a_mistral_has_others() -> None:
    settings = dict(head_settings(LlamaConfig(**WIDE), {"hidden_size": 64, "pretraining_tp": 1}, SIX))
    assert settings["max_position_embeddings"] == 64
    assert "pretraining_tp" not in settings
    assert MistralConfig.from_dict(settings).max_position_embeddings == 64


@pytest.mark.parametrize(("version", "written"), [(None, "5.0.0"), ("4.38.1", "5.0.0"), ("5.9.1", "5.9.1")])
def test_loaders_are_not_led_to_think_of_the_first_mistrals_tokenizers(version: str | None, written: str) -> None:
    config, named = LlamaConfig(**WIDE), {} if version is None else {"transformers_version": version}
    settings = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    assert head_settings(config, {**settings, **named}, SIX)["transformers_version"] == written


def test_rope_settings_of_old_files_go_along_as_they_are() -> None:
    old = {"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    config = LlamaConfig.from_dict({**WIDE, **old})
    written = {**WIDE, **old}
    settings = dict(head_settings(config, written, SIX))
    assert {name: settings[name] for name in old} == old
    assert MistralConfig.from_dict(settings).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("family", ["h-llama-wide-biased", "h-gemma2-wide"])
def test_what_would_not_load_is_refused_with_the_numbers_that_would(family: str) -> None:
    config = OTHERS[family]
    message = r"with 6 query heads would not load .*hidden size \(64\) .*; with `head_unit: group`, heads may be "
    with pytest.raises(ConfigError, match=message + r"0\.5 \(4 left\), 0\.75 \(2 left\)\. Or leave `heads` out"):
        require_loadable(config, config.to_diff_dict(), SIX, "group")
    require_loadable(config, config.to_diff_dict(), FOUR, "query")


def test_rope_factors_that_stock_transformers_counts_by_heads_let_none_go() -> None:
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = Phi3Config(**WIDE, rope_parameters=rope, original_max_position_embeddings=32)
    message = (
        r"phi3 with 6 query heads would not load .*short_factor field must have length 5, got 4; no `head_unit: gr"
    )
    with pytest.raises(ConfigError, match=message):
        require_loadable(config, config.to_diff_dict(), SIX, "group")
