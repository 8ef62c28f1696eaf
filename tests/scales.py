"""LLaMA-2-70B as a run in numbers, for tests of plans."""

from dataclasses import replace

import torch

from pipeline.methods.step import Step
from pipeline.planning.scale import Scale
from pipeline.planning.work import Workload
from pipeline.recipe import Recipe

D, KV, F = 8192, 1024, 28672
K = 20480
"""Neurons that are left of F where some are to go."""

LLAMA_70B = Workload(
    groups=(((D, D), (KV, D), (KV, D)), ((D, D),), ((F, D), (F, D)), ((D, F),)),
    hidden=D, num_blocks=80, num_sequences=128, num_tokens=2048,
)  # fmt: skip
NARROW_70B = replace(LLAMA_70B, left=(((D, D), (KV, D), (KV, D)), ((D, D),), ((K, D), (K, D)), ((D, K),)))


def scale_70b(*steps: Step, unified: bool = False, work: Workload = LLAMA_70B) -> Scale:
    """A run over 128 x 2048 tokens in bf16, on a GPU unless told otherwise."""
    return Scale(
        work=work,
        recipe=Recipe(steps=steps),
        names=(("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
        block_numel=LLAMA_70B.num_weights + 2 * D,
        outside_numel=32000 * D,
        vocab_size=32000,
        dtype=torch.bfloat16,
        stored=torch.bfloat16,
        unified=unified,
    )
