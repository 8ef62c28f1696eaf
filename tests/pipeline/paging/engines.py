"""The I/O engines that can be tested here, and small things the tests of paging share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.paging.aio import AioPager, is_built
from pipeline.paging.pager import Pager, ThreadPager

needs_aio = pytest.mark.skipif(not is_built(), reason="DeepSpeed's aio is not built: secateur doctor --build")

Open = Callable[[Path], Pager]
"""Opens an engine that works in a directory."""


def open_threads(directory: Path) -> Pager:
    return ThreadPager()


def open_aio(directory: Path) -> Pager:
    return AioPager(directory)


ENGINES = [pytest.param(open_threads, id="threads"), pytest.param(open_aio, id="aio", marks=needs_aio)]


def random_bytes(num_bytes: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


def content(buffer: torch.Tensor) -> bytes:
    return buffer.numpy().tobytes()


def fill(buffer: torch.Tensor, data: bytes) -> torch.Tensor:
    """Copy bytes into a buffer of their size."""
    return buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
