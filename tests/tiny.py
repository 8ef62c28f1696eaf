"""Tiny random checkpoints of every supported family, with a tokenizer, for tests that run the real thing."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 96
WINDOW = 8
"""Sliding window of the families that have one: shorter than the sequences of the tests."""

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**GROUPED, sliding_window=WINDOW),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        **SPECIAL,
    ),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, **SPECIAL),
}


def save_tiny(family: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "20kB") -> PreTrainedModel:
    """Write a random checkpoint of a family in small shards, with its tokenizer; return the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.eval()
    model.save_pretrained(directory, max_shard_size=shard)
    save_tokenizer(directory)
    return model


def save_mixtral(directory: Path) -> None:
    """Write a tiny mixture-of-experts checkpoint, which is refused so far."""
    config = MixtralConfig(**GROUPED, num_local_experts=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    save_tokenizer(directory)


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of one token a character."""
    characters = [chr(code) for code in range(32, 32 + VOCAB - 4)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(directory)


def some_tokens(num_sequences: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids, int64 [num_sequences, num_tokens]."""
    return torch.randint(4, VOCAB, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(seed))


def some_text(num_characters: int = 20_000, seed: int = 0) -> str:
    """Return random text of the tokenizer's characters, with words in it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(32, 32 + VOCAB - 4, (num_characters,), generator=generator)
    return "".join(chr(code) for code in codes.tolist())
