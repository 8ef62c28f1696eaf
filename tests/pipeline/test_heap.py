"""Blocks that come and go leave no memory behind."""

import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from tests.bench.synthetic import write_llama

CHILD = """
import sys
from pathlib import Path
import torch
from pipeline.checkpoint import Checkpoint
from pipeline.skeleton import Skeleton

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
skeleton.load_block(0, checkpoint)
skeleton.release_block(0)
before = resident()
for index in [*range(8)] * 3:
    skeleton.load_block(index, checkpoint)
    skeleton.release_block(index)
print(resident() - before)
"""
BLOCK_BYTES = 4 * 3_540_000


def test_resident_memory_does_not_grow_with_the_blocks_that_were_read(tmp_path: Path) -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    write_llama(tmp_path / "model", LlamaConfig(**shape, num_hidden_layers=8, vocab_size=64))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 4 * BLOCK_BYTES
