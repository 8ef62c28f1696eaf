"""Blocks that come and go leave no memory behind."""

import subprocess
import sys
from pathlib import Path

CHILD = """
import sys
from pathlib import Path
import torch
from pipeline.heap import give_back_freed_memory

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

def come_and_go():
    kept = []
    for size in (300_000, 7_000_000, 900_000, 3_000_000):  # bytes, all below glibc's largest mmap threshold
        kept.append(torch.ones(size, dtype=torch.uint8))
    between = [bytearray(2000) for _ in range(200)]  # small things that outlive them pin the heap's top
    del kept
    return between

torch.ones(30_000_000, dtype=torch.uint8)  # once freed, glibc serves everything smaller from its heaps
pinned = [come_and_go()]
give_back_freed_memory()
before = resident()
for _ in range(40):
    pinned.append(come_and_go())
    give_back_freed_memory()
print(resident() - before - 40 * 200 * 2100)
"""


def test_freed_tensors_are_given_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) < 20_000_000
