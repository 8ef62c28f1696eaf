"""Runs one configuration in a process of its own and reports its peak memory beyond the imports, and its cost."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = """
import json, sys
from pathlib import Path
import torch
from pipeline.config import parse_config
from pipeline.progress import Silent
from pipeline.run import run

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

config = parse_config(json.loads(sys.argv[1]), "measured run")
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
report = run(config, Silent(), lambda: False)
print(json.dumps({"beyond": status("VmHWM:") - before, "imports": before, "report": report.as_json()}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run took."""

    beyond_imports: int
    """Bytes: the kernel's high-water mark of resident memory, less what was resident after the imports."""

    imports: int
    report: dict[str, Any]


def measure(config: dict[str, Any]) -> Measured:
    """Run a configuration (plain data) in a fresh process; raises CalledProcessError with its output on failure."""
    command = [sys.executable, "-c", CHILD, json.dumps(config)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    figures = json.loads(done.stdout.splitlines()[-1])
    return Measured(beyond_imports=figures["beyond"], imports=figures["imports"], report=figures["report"])
