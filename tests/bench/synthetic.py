"""Checkpoints with the shapes of large models and random weights, streamed to disk from a seed.

python -m tests.bench.synthetic DIRECTORY --hidden 4096 --ffn 14336 --blocks 8
"""

import argparse
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from transformers import LlamaConfig

from pipeline.checkpoint import write_index
from pipeline.shards import OutputTensor, tensor_chunks, write_shard
from tests.tiny import save_tokenizer

DTYPE = torch.bfloat16
PIECE = 1 << 22
"""Random numbers made at once."""


def random_chunks(shape: tuple[int, ...], seed: int) -> Iterator[memoryview]:
    """Yield a bf16 tensor of normal numbers (0.02 standard deviation; norms around 1), a piece at a time."""
    generator = torch.Generator().manual_seed(seed)
    numel = prod(shape)
    for start in range(0, numel, PIECE):
        piece = torch.randn(min(PIECE, numel - start), generator=generator).mul_(0.02)
        yield from tensor_chunks((piece + 1 if len(shape) == 1 else piece).to(DTYPE))


def llama_config(
    hidden: int, ffn: int, num_blocks: int, num_kv_heads: int | None = None, vocab: int = 32000
) -> LlamaConfig:
    """Return the configuration of a LLaMA with heads of 128 features, by default four to a key-value head."""
    num_heads = hidden // 128
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=num_blocks,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or max(1, num_heads // 4),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return name within the block -> shape of every tensor of a LLaMA block."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def write_llama(directory: Path, config: LlamaConfig) -> None:
    """Write a LLaMA-shaped checkpoint, a shard a block, never more than a few MB of it in memory."""
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    save_tokenizer(directory)
    hidden, vocab = config.hidden_size, config.vocab_size
    outside = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shards: list[dict[str, tuple[int, ...]]] = [{**outside, "lm_head.weight": (vocab, hidden)}]
    for index in range(config.num_hidden_layers):
        shards.append({f"model.layers.{index}.{name}": shape for name, shape in block_shapes(config).items()})
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = [
            OutputTensor(name=name, dtype=DTYPE, shape=shape, chunks=partial(random_chunks, shape, 1000 * number + i))
            for i, (name, shape) in enumerate(shapes.items())
        ]
        write_shard(directory / file, tensors)
        weight_map.update(dict.fromkeys(shapes, file))
    write_index(directory, weight_map, sum(2 * prod(s) for shapes in shards for s in shapes.values()))


def main() -> None:
    """Write a checkpoint as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--kv-heads", type=int)
    asked = parser.parse_args()
    write_llama(asked.directory, llama_config(asked.hidden, asked.ffn, asked.blocks, asked.kv_heads, asked.vocab))


if __name__ == "__main__":
    main()
