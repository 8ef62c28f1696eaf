"""Weights that come and go leave no memory behind, nor does what was made with them."""

import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from tests.bench.synthetic import write_llama

PRELUDE = """
import sys
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from pipeline.checkpoint import Checkpoint
from pipeline.heap import give_back_freed_memory
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
"""

BLOCKS = """
skeleton.load_block(0, checkpoint)
skeleton.release_block(0)
before = resident()
for index in [*range(8)] * 3:
    skeleton.load_block(index, checkpoint)
    skeleton.release_block(index)
print(resident() - before)
"""

HEAD = """
stream = Stream(skeleton, checkpoint)

def evaluate(num_tokens):
    hidden, labels = torch.ones(1, num_tokens, 576), torch.zeros(num_tokens).long()
    with stream.outside_weights(), torch.no_grad():
        for _ in range(4):
            cross_entropy(stream.logits(hidden)[0], labels)

evaluate(128)
after = resident()
give_back_freed_memory()
print(after - resident())
"""

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
BLOCK_BYTES = 4 * 3_540_000
HEAD_BYTES = 4 * 576 * 32_768


def told_by(child: str, model: Path) -> int:
    """The number of bytes that a process of its own tells."""
    command = [sys.executable, "-c", PRELUDE + child, str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return int(done.stdout)


def test_resident_memory_does_not_grow_with_the_blocks_that_were_read(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", LlamaConfig(**SHAPE, num_hidden_layers=8, vocab_size=64))
    assert told_by(BLOCKS, tmp_path / "model") < 4 * BLOCK_BYTES


def test_nothing_is_left_of_logits_when_the_head_goes(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=32_768))
    assert told_by(HEAD, tmp_path / "model") < HEAD_BYTES / 8
