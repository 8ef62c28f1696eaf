"""What a run costs: seconds per phase and peak memory, as the operating system counts it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import psutil
import torch


class Stopwatch:
    """Adds up wall-clock seconds by phase. On an accelerator each phase ends when its work has finished."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._clock = clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block towards `name`."""
        start = self._clock()
        try:
            yield
        finally:
            synchronise(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start


class PeakMeter:
    """High-water marks of memory by phase, as the kernel and the device's allocator keep them.

    Where the kernel cannot be told to begin anew (it can on Linux), a phase's mark is that of the process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host: dict[str, int] = {}
        """Resident bytes of this process, by phase; what lies between phases is `other`."""

        self.device: dict[str, int] = {}
        """Bytes allocated on a CUDA device, by phase; empty elsewhere."""

        self._begin_anew()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as one phase; phases do not nest."""
        self._take("other")
        try:
            yield
        finally:
            self._take(name)

    @property
    def peak_host_bytes(self) -> int:
        """The highest mark of all phases up to now."""
        self._take("other")
        return max(self.host.values())

    @property
    def peak_device_bytes(self) -> int:
        """The highest mark of all phases up to now; 0 where the device keeps none."""
        self._take("other")
        return max(self.device.values(), default=0)

    def _take(self, name: str) -> None:
        """Credit the marks since the last time to a phase, and begin anew."""
        self.host[name] = max(self.host.get(name, 0), peak_host_bytes())
        if self._device.type == "cuda":
            self.device[name] = max(self.device.get(name, 0), peak_device_bytes(self._device))
        self._begin_anew()

    def _begin_anew(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def synchronise(device: torch.device) -> None:
    """Wait for work queued on an accelerator; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_host_bytes() -> int:
    """Return the high-water mark of this process's resident memory, from the kernel."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_device_bytes(device: torch.device) -> int:
    """Return the high-water mark of memory allocated on a CUDA device; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
