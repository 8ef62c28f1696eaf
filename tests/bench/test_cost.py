"""Cost in forward passes and memory beyond the imports: the demo model, and 4 GB of bf16 with few resources.

A forward pass is what `propagate` takes in the same run, so figures are ratios within one run.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.bench.measure import measure
from tests.bench.synthetic import write_llama

pytestmark = pytest.mark.bench

DEMO = Path(__file__).parents[2] / "models/smollm2-135m"


def job(model: Path, output: Path, recipe: list[Any], sequences: int, tokens: int, dtype: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "output": str(output),
        "calibration": {"source": "embedded", "sequences": sequences, "tokens": tokens},
        "prune": {"sparsity": 0.5, "recipe": recipe},
        "compute": {"dtype": dtype},
    }


@pytest.mark.parametrize(("recipe", "most_passes"), [("wanda", 2.4), ("besa", 8.0)])
def test_cost_in_forward_passes(recipe: str, most_passes: float, tmp_path: Path) -> None:
    measured = measure(job(DEMO, tmp_path / "run", [recipe], 16, 256, "float32"))
    passes = measured.report["forward_equivalents"]
    sys.stdout.write(
        f"\n{recipe}: {passes:.2f} forward passes, {measured.beyond_imports / 1e9:.2f} GB beyond the imports\n"
    )
    assert passes <= most_passes
    assert measured.beyond_imports < 0.5e9


@pytest.fixture(scope="module")
def four_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "model"
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    write_llama(directory, LlamaConfig(**shape, num_hidden_layers=8, vocab_size=32000, tie_word_embeddings=False))
    return directory


@pytest.mark.parametrize(("recipe", "limit"), [("wanda", 2.0e9), ("besa", 3.5e9)])
def test_memory_of_a_large_model(recipe: str, limit: float, four_gigabytes: Path, tmp_path: Path) -> None:
    measured = measure(job(four_gigabytes, tmp_path / "run", [recipe], 4, 128, "bfloat16"))
    sys.stdout.write(f"\n{recipe}, 8 blocks, 4 GB in bf16: {measured.beyond_imports / 1e9:.2f} GB beyond the imports\n")
    assert measured.beyond_imports < limit
