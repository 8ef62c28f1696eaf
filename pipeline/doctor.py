"""What this machine offers: versions, devices, memory, how fast its disk and its arithmetic really are.

Everything is measured or asked here and nothing is printed; the command line draws the table. A check that
fails becomes a finding with its way out, never an exception.
"""

import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
import torch

from pipeline.devices import choose_device

LIBRARIES = ("torch", "transformers", "datasets", "safetensors")
OLDEST_PYTHON = (3, 11)
GIB = 1 << 30
IO_PIECE_BYTES = 8 << 20
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
    """Free space and bandwidth where the spool is, or will be."""
    try:
        directory = next(path for path in (spool, *spool.absolute().parents) if path.exists())
        free = shutil.disk_usage(directory).free
        write_seconds, read_seconds = _disk_seconds(directory, num_bytes)
    except OSError as error:
        advice = "set memory.spool to a directory this user can write, on a disk with room"
        return [Finding(name="spool", value=f"{spool}: {error}", ok=False, advice=advice)]
    return [
        Finding(name="spool", value=f"{spool}, {_gib(free)} free", ok=True, advice=""),
        _bandwidth("spool write", num_bytes / write_seconds),
        _bandwidth("spool read", num_bytes / read_seconds),
    ]


def _bandwidth(name: str, bytes_per_second: float) -> Finding:
    slow = bytes_per_second < SLOW_DISK_BYTES_PER_SECOND
    advice = "slow for paging: set memory.spool to a local solid-state disk" if slow else ""
    return _fact(name, f"{bytes_per_second / 1e6:.0f} MB/s", advice)


def _disk_seconds(directory: Path, num_bytes: int) -> tuple[float, float]:
    """Seconds to write `num_bytes` through to the disk, and to read them back from it.

    Random bytes, which no file system can compress; a nameless file, which no crash leaves behind.
    """
    payload = memoryview(os.urandom(num_bytes))
    with tempfile.TemporaryFile(dir=directory) as file:
        began = perf_counter()
        for start in range(0, num_bytes, IO_PIECE_BYTES):
            file.write(payload[start : start + IO_PIECE_BYTES])
        file.flush()
        os.fsync(file.fileno())
        written = perf_counter()
        _drop_from_page_cache(file)
        began_read = perf_counter()
        _read_all(file)
        return written - began, perf_counter() - began_read


def _drop_from_page_cache(file: io.BufferedRandom) -> None:
    # Where the system has no such call the read may come from memory, and shows as a rate no disk has.
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_all(file: io.BufferedRandom) -> None:
    file.seek(0)
    buffer = bytearray(IO_PIECE_BYTES)
    while file.readinto(buffer):
        pass


def _arithmetic(device: torch.device, size: int) -> list[Finding]:
    return [_matmul(device, size, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _matmul(device: torch.device, size: int, dtype: torch.dtype) -> Finding:
    name = f"matmul {str(dtype).removeprefix('torch.')} on {device}"
    try:
        flops = 2 * size**3 / _matmul_seconds(device, size, dtype)
    except RuntimeError as error:  # the device has no such arithmetic, or no room for the matrices
        return Finding(name=name, value=f"fails: {error}", ok=False, advice="set compute.dtype to another type")
    return _fact(name, f"{flops / 1e12:.3g} TFLOP/s")


def _matmul_seconds(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Seconds of the best of three products of a square matrix with itself, after one to warm up."""
    # Random numbers: constant matrices draw less power, and a device then runs faster than it will at work.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.rand(size, size, dtype=dtype, device=device, generator=generator)
    seconds = []
    for _ in range(4):
        began = perf_counter()
        left @ left
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(perf_counter() - began)
    return min(seconds[1:])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
