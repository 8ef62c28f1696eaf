"""Blocks with the shapes of LLaMA-2-70B on this machine's CPU, hidden states on disk: ceilings that hold.

    python -m pytest tests/bench/test_big_blocks.py -m bench -s     # 8 GB of checkpoint, 8 of output, some 20 minutes

The checkpoint is made once, in the directory that SECATEUR_BIG names, or in a temporary one.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.measure import measure
from tests.bench.synthetic import llama_config, write_llama

pytestmark = pytest.mark.bench

GIB = 1 << 30
NUM_BLOCKS = 4
PLANNED_WITHIN = 0.15


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kept = os.environ.get("SECATEUR_BIG")
    directory = Path(kept) if kept else tmp_path_factory.mktemp("big") / "model"
    if not directory.exists():
        write_llama(directory, llama_config(8192, 28672, NUM_BLOCKS, num_kv_heads=8))
    yield directory
    if not kept:
        shutil.rmtree(directory)


@pytest.mark.parametrize(("recipe", "ceiling"), [("wanda", 6 * GIB), ("besa", 8 * GIB)])
def test_a_run_keeps_to_its_ceiling_and_to_its_plan(recipe: str, ceiling: int, source: Path, tmp_path: Path) -> None:
    measured = measure(
        {
            "model": str(source),
            "output": str(tmp_path / "run"),
            "calibration": {"source": "embedded", "sequences": 8, "tokens": 128},
            "prune": {"sparsity": 0.5, "recipe": [recipe]},
            "compute": {"dtype": "bfloat16", "batch": 4},
            "memory": {"host": ceiling, "activations": "disk"},
        }
    )
    shutil.rmtree(tmp_path / "run")
    planned = measured.report["planned"]["host_bytes"]["planned"]
    sys.stdout.write(
        f"\n{recipe}: peak {measured.peak / GIB:.2f} GiB of {ceiling / GIB:.0f}, planned {planned / GIB:.2f}; "
        f"by phase { ({k: round(v / GIB, 2) for k, v in measured.report['peaks']['host'].items()}) }; "
        f"seconds { ({k: round(v) for k, v in measured.report['seconds'].items()}) }; {measured.report['traffic']}\n"
    )
    assert measured.peak <= ceiling
    assert abs(measured.peak - planned) <= PLANNED_WITHIN * planned
