"""Runs one configuration in a process of its own and watches its memory from outside: the kernel's high-water mark."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = """
import ctypes, json, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a run does not outlast whoever measures it
from pipeline.config import parse_config
from pipeline.progress import Silent
from pipeline.run import run

config = parse_config(json.loads(sys.argv[1]), "measured run")
print("imported", flush=True)
report = run(config, Silent(), lambda: False)
print(json.dumps(report.as_json()))
"""

SAMPLE_SECONDS = 0.005
"""Between two looks: a run begins its mark anew at every phase, so one look in each is enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run took."""

    peak: int
    """Bytes: the highest of all marks of resident memory."""

    imports: int
    """Bytes that were resident before the run began."""

    elapsed: float
    """Seconds from then on until its end."""

    report: dict[str, Any]

    @property
    def beyond_imports(self) -> int:
        """Bytes above what was resident before."""
        return self.peak - self.imports


def measure(config: dict[str, Any]) -> Measured:
    """Run a configuration (plain data) in a fresh process; raises RuntimeError with its errors on failure."""
    command = [sys.executable, "-c", CHILD, json.dumps(config)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        while child.stdout.readline() != "imported\n":
            if child.poll() is not None:
                raise RuntimeError(child.communicate()[1])
        began = time.perf_counter()
        imports = peak = status_bytes(child.pid, "VmRSS")
        while child.poll() is None:
            peak = max(peak, status_bytes(child.pid, "VmHWM"))
            time.sleep(SAMPLE_SECONDS)
        printed, errors = child.communicate()
        elapsed = time.perf_counter() - began
        if child.returncode:
            raise RuntimeError(errors)
    return Measured(peak=peak, imports=imports, elapsed=elapsed, report=json.loads(printed.splitlines()[-1]))


def status_bytes(pid: int, key: str) -> int:
    """Return a figure of /proc/PID/status in bytes; 0 once the process has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
