"""Blocks with the shapes of LLaMA-2-70B on an accelerator: seconds a block and peak memory, under ceilings.

    SECATEUR_BIG=DIRECTORY python -m pytest tests/gpu/test_big_blocks.py -s      # makes the checkpoint there, once

128 sequences of 2048 tokens, as the papers calibrate; two blocks are pruned, and the figures extrapolated to 80.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.measure import measure
from tests.bench.synthetic import llama_config, write_llama

GIB = 1 << 30
NUM_BLOCKS, WHOLE_MODEL = 2, 80
DEVICE_CEILING, HOST_CEILING = 24 * GIB, 16 * GIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("SECATEUR_BIG" not in os.environ, reason="SECATEUR_BIG names no directory for 5 GB of weights"),
]


@pytest.fixture(scope="module")
def source() -> Path:
    directory = Path(os.environ["SECATEUR_BIG"])
    if not directory.exists():
        write_llama(directory, llama_config(8192, 28672, NUM_BLOCKS, num_kv_heads=8))
    return directory


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "besa"])
def test_a_block_of_70b_is_pruned_under_the_ceilings_of_one_card_and_a_small_host(
    recipe: str, source: Path, tmp_path: Path
) -> None:
    measured = measure(
        {
            "model": str(source),
            "output": str(tmp_path / "run"),
            "calibration": {"source": "embedded", "sequences": 128, "tokens": 2048},
            "prune": {"sparsity": 0.5, "recipe": [recipe]},
            "compute": {"device": "cuda", "dtype": "bfloat16", "batch": 1},
            "memory": {"device": DEVICE_CEILING, "host": HOST_CEILING},
        }
    )
    shutil.rmtree(tmp_path / "run")
    report = measured.report
    seconds = {phase: spent / NUM_BLOCKS for phase, spent in report["seconds"].items()}
    device_peak = max(report["peaks"]["device"].values())
    sys.stdout.write(
        f"\n{recipe} on {torch.cuda.get_device_name()}: {sum(seconds.values()):.1f} s a block "
        f"({', '.join(f'{phase} {spent:.1f}' for phase, spent in seconds.items())}), "
        f"{sum(seconds.values()) * WHOLE_MODEL / 60:.0f} min for {WHOLE_MODEL} blocks; device "
        f"{device_peak / GIB:.1f} GiB, host {measured.peak / GIB:.1f} GiB; by phase {report['peaks']}; "
        f"{report['traffic']}; {report['planned']}\n"
    )
    assert device_peak <= DEVICE_CEILING
    assert measured.peak <= HOST_CEILING
