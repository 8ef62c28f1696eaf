"""What this machine offers: versions, devices, memory, I/O engines, how fast its disk and its arithmetic really are.

Everything is asked here, or measured by pipeline/probes.py; nothing is printed, and nothing built. The command line
draws the table. A check that fails becomes a finding with its way out, never an exception.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pipeline.devices import choose_device
from pipeline.errors import StorageError
from pipeline.paging.aio import AioPager, is_built, is_installed
from pipeline.paging.engines import BUILD, INSTALL, why_not_aio
from pipeline.paging.pager import Pager, ThreadPager
from pipeline.planning.probes import copy_speed, disk_speed, matmul_flops

LIBRARIES = ("torch", "transformers", "datasets", "safetensors")
OLDEST_PYTHON = (3, 11)
GIB = 1 << 30
# Below this the disk, not the arithmetic, will set a paged run's pace.
SLOW_DISK_BYTES_PER_SECOND = 500e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the examination."""

    name: str
    """What was looked at."""
    value: str
    """What was found, with its unit."""
    ok: bool | None
    """Fit for work, unfit, or (None) neither: just a fact."""
    advice: str
    """What to do about it; empty when there is nothing to do."""


def examine(
    spool: Path,
    *,
    disk_bytes: int = 256 << 20,
    matmul_size: int | None = None,
    device: torch.device | None = None,
) -> list[Finding]:
    """Look at everything a run depends on. Takes a few seconds.

    `spool` need not exist: its nearest existing parent is examined. `disk_bytes` are written and read there,
    then gone. `matmul_size` is the side of the square matrix multiplied on `device`; by default the
    accelerator, if there is one, with a size that keeps it busy.
    """
    device = device or choose_device("auto")
    size = matmul_size or (1024 if device.type == "cpu" else 8192)
    return [
        _python(),
        *(_library(name) for name in LIBRARIES),
        _gguf(),
        *_devices(),
        _cores(),
        _host_memory(),
        *_spool(spool, disk_bytes),
        *_arithmetic(device, size),
        *_copies(device),
    ]


def _fact(name: str, value: str, advice: str = "") -> Finding:
    return Finding(name=name, value=value, ok=None, advice=advice)


def _python() -> Finding:
    ok = sys.version_info >= OLDEST_PYTHON
    return Finding(
        name="python",
        value=platform.python_version(),
        ok=ok,
        advice="" if ok else "install Python {}.{} or newer".format(*OLDEST_PYTHON),
    )


def _library(name: str) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name), ok=True, advice="")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, value="missing", ok=False, advice=f"pip install {name}")


def _gguf() -> Finding:
    if importlib.util.find_spec("gguf") is None:
        return _fact("gguf", "missing", "only demo-model needs it: pip install 'secateur[demo]'")
    return _fact("gguf", "present")


def _devices() -> list[Finding]:
    """One finding per accelerator; one that says so when there is none."""
    if torch.cuda.is_available():
        return [_cuda_device(index) for index in range(torch.cuda.device_count())]
    if torch.accelerator.is_available():
        return [_fact("device", f"{choose_device('auto').type} x {torch.accelerator.device_count()}")]
    return [_fact("device", "cpu only", "large models prune slowly without an accelerator")]


def _cuda_device(index: int) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return _fact(f"device cuda:{index}", f"{name}, {_gib(free)} free of {_gib(total)}")


def _cores() -> Finding:
    # The cores this process may use: a container or a scheduler often grants fewer than the machine has.
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    num_threads = torch.get_num_threads()
    advice = f"set OMP_NUM_THREADS={num_cores}" if num_threads > num_cores else ""
    return _fact("cores", f"{num_cores}, torch uses {num_threads} threads", advice)


def _host_memory() -> Finding:
    memory = psutil.virtual_memory()
    return _fact("host memory", f"{_gib(memory.available)} free of {_gib(memory.total)}")


def _spool(spool: Path, num_bytes: int) -> list[Finding]:
    """Free space where the spool is, or will be, and what each I/O engine makes of its disk."""
    try:
        directory = next(path for path in (spool, *spool.absolute().parents) if path.exists())
        free = shutil.disk_usage(directory).free
        threads = _bandwidths(directory, ThreadPager(), num_bytes)
        reason = why_not_aio(directory)
        aio = [] if reason else _bandwidths(directory, AioPager(directory), num_bytes)
    except (OSError, StorageError) as error:
        advice = "set memory.spool to a directory this user can write, on a disk with room"
        return [_deepspeed(""), Finding(name="spool", value=f"{spool}: {error}", ok=False, advice=advice)]
    return [
        _deepspeed(reason),
        Finding(name="spool", value=f"{spool}, {_gib(free)} free", ok=True, advice=""),
        _fact("spool engine", "threads" if reason else "aio"),
        *aio,
        *threads,
    ]


def _deepspeed(reason: str) -> Finding:
    """What there is of DeepSpeed's asynchronous I/O; `reason`: why it cannot be used in the spool."""
    if not is_installed():
        return _fact("deepspeed aio", "not installed", f"optional, for faster paging: {INSTALL}, then {BUILD}")
    if not is_built():
        return _fact("deepspeed aio", "not built", BUILD)
    return Finding(
        name="deepspeed aio", value="built, unusable here" if reason else "built", ok=not reason, advice=reason
    )


def _bandwidths(directory: Path, pager: Pager, num_bytes: int) -> list[Finding]:
    """What one engine reaches; the pager is closed."""
    with closing(pager):
        speeds = disk_speed(directory, pager, num_bytes)
    return [
        _bandwidth(f"spool {what}, {pager.name}", speed) for what, speed in zip(("write", "read"), speeds, strict=True)
    ]


def _bandwidth(name: str, bytes_per_second: float) -> Finding:
    slow = bytes_per_second < SLOW_DISK_BYTES_PER_SECOND
    advice = "slow for paging: set memory.spool to a local solid-state disk" if slow else ""
    return _fact(name, f"{bytes_per_second / 1e6:.0f} MB/s", advice)


def _arithmetic(device: torch.device, size: int) -> list[Finding]:
    return [_matmul(device, size, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _matmul(device: torch.device, size: int, dtype: torch.dtype) -> Finding:
    name = f"matmul {str(dtype).removeprefix('torch.')} on {device}"
    try:
        flops = matmul_flops(device, dtype, size)
    except RuntimeError as error:  # the device has no such arithmetic, or no room for the matrices
        return Finding(name=name, value=f"fails: {error}", ok=False, advice="set compute.dtype to another type")
    return _fact(name, f"{flops / 1e12:.3g} TFLOP/s")


def _copies(device: torch.device) -> list[Finding]:
    return [] if device.type in ("cpu", "meta") else [_fact("copy to device", f"{copy_speed(device) / 1e9:.1f} GB/s")]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
