"""A real Ray head in processes of its own, asking for a token, and virtual environments that have not our sources.

The head is started as an operator starts one (`ray start --head`), from an environment without secateur; the client is
another environment, in which a wheel of this tree is installed.
"""

import os
import secrets
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from ray._raylet import AuthenticationTokenLoader

from tests.cluster.ray_session import QUIET, STORE_BYTES, remove
from tests.integration.processes import PATIENCE, ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A Ray cluster of one node."""

    address: str
    token: str
    token_file: Path
    directory: Path
    """Of its logs and sockets."""


@contextmanager
def ray_head(scratch: Path, num_cpus: int = 4) -> Iterator[Head]:
    """Start a Ray head with token authentication and ports of its own; end it with all its processes."""
    python = environment_without_sources(scratch / "cluster-venv")
    token_file = scratch / "token"
    token_file.write_text(token := secrets.token_hex(32))
    directory = tempfile.mkdtemp(prefix="ray-")  # a short path: see `local_ray`
    ports = dict(zip(("", "dashboard-", "dashboard-agent-listen-", "ray-client-server-"), free_ports(4), strict=True))
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--temp-dir={directory}", f"--num-cpus={num_cpus}", f"--object-store-memory={STORE_BYTES}"]
    command += [f"--{name}port={port}" for name, port in ports.items()]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    elsewhere = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}", "RAY_TMPDIR": directory}
    with (scratch / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=bare_environment() | QUIET | secret | elsewhere, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{ports['dashboard-']}"
    try:
        wait_for_answer(address, token, process, scratch / "head.log")
        yield Head(address=address, token=token, token_file=token_file, directory=Path(directory))
    finally:
        end(process)
        remove(directory)


def forget_token() -> None:
    """Have Ray look for a token anew: a process keeps the first it has found, for clusters of its own as well."""
    AuthenticationTokenLoader.instance().reset_cache()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a head as an operator would, then whatever of its session is left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if sessions := [int(pid.name) for pid in Path("/proc").glob("[0-9]*") if in_session(pid, process.pid)]:
        for pid in sessions:
            os.kill(pid, signal.SIGKILL)


def in_session(process: Path, session: int) -> bool:
    """Whether a process, by its directory in /proc, belongs to a session."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_answer(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the job server of a head takes requests."""
    request = Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urlopen(request, timeout=10).close()
        except (URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


def free_ports(count: int) -> list[int]:
    """Return ports nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def bare_environment() -> dict[str, str]:
    """The environment of the tests, less what leads to our sources, to another cluster or to a token."""
    hidden = ("PYTHONPATH", "RAY_", "VIRTUAL_ENV", "HF_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def environment_without_sources(directory: Path) -> str:
    """Make a virtual environment that has this one's libraries, but not our packages; return its interpreter."""
    venv.EnvBuilder(symlinks=True).create(directory)
    (own,) = (directory / "lib").glob("python*/site-packages")
    # Paths in a .pth file are importable, but .pth files there, an editable installation's too, are not read.
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return str(directory / "bin" / "python")


def build_wheel(scratch: Path) -> Path:
    """Build the wheel of this tree, outside of it."""
    tree = scratch / "tree"
    tree.mkdir()
    for name in ("pipeline", "cluster"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(scratch)!r})"
    run_quietly([sys.executable, "-c", code], tree)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def environment_with_wheel(scratch: Path) -> str:
    """Make a virtual environment with a wheel of this tree installed; return its interpreter."""
    python = environment_without_sources(scratch / "client-venv")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location", str(build_wheel(scratch))]
    run_quietly([sys.executable, "-m", "pip", "--python", python, *install], scratch)
    return python


def run_quietly(command: Sequence[str], directory: Path) -> None:
    """Run a command that must succeed; what it says is shown where it does not."""
    done = subprocess.run(
        command, cwd=directory, env=bare_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
