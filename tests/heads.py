"""Families with enough attention heads to lose some, for tests that take heads out."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny import FAMILIES, SHAPE, WINDOW

HEADS = {**SHAPE, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
"""Three groups of two query heads; 4 and 3 divide the hidden size, and so are taken by every family."""

WIDE = {**SHAPE, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Four groups of two; the 6 heads of three do not divide the hidden size."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

FITTING: dict[str, PretrainedConfig] = {
    "h-llama": LlamaConfig(**HEADS, head_dim=10),
    "h-llama-whole": LlamaConfig(**{**HEADS, "num_attention_heads": 3}),
    "h-llama-biased": LlamaConfig(**HEADS, attention_bias=True),
    "h-mistral": MistralConfig(**HEADS, sliding_window=WINDOW),
    "h-qwen2": Qwen2Config(**WIDE),
    "h-qwen3": Qwen3Config(**WIDE, head_dim=10),
    "h-gemma": GemmaConfig(**WIDE, head_dim=8),
    "h-gemma2": Gemma2Config(**HEADS, head_dim=8, sliding_window=WINDOW),
    "h-gemma3": Gemma3TextConfig(**HEADS, head_dim=8, sliding_window=WINDOW),
    "h-granite": GraniteConfig(**WIDE),
    "h-phi3": Phi3Config(**WIDE, sliding_window=WINDOW),
}
"""Families, by name, whose attentions can lose a group of heads."""

OTHERS: dict[str, PretrainedConfig] = {
    "h-llama-wide": LlamaConfig(**WIDE),
    "h-llama-wide-rope": LlamaConfig(**WIDE, rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-4),
    "h-llama-wide-biased": LlamaConfig(**WIDE, attention_bias=True),
    "h-gemma2-wide": Gemma2Config(**WIDE, head_dim=8),
    "h-olmo2": Olmo2Config(**WIDE),
}


@contextmanager
def families_with_heads() -> Iterator[None]:
    """Have these families among those that tests write."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in {**FITTING, **OTHERS}.items():
            patch.setitem(FAMILIES, name, config)
        yield
