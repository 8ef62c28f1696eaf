"""What a job begins with on the cluster: a look at what is there, then the run; and the end of another's process."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster import entry
from cluster.package import PINS


@pytest.fixture
def in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / PINS).write_text("pyyaml==0.0.1\n")
    monkeypatch.setattr("sys.argv", ["entry", "run", "secateur-a-1"])
    return tmp_path


def test_a_cluster_that_lacks_something_is_told_all_of_it(in_a_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "unmet", lambda needed: ["torch>=2.6: not installed", "pydantic>=3: 2.1 is installed"])
    with pytest.raises(
        SystemExit, match=r"(?s)lacks what the job needs\ntorch>=2.6: not installed\npydantic.*--install"
    ):
        entry.main()


def test_the_run_begins_with_the_settings_of_the_job_and_other_versions_are_told(
    in_a_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "unmet", lambda needed: [])
    monkeypatch.setattr("cluster.cli.main", lambda: None)
    entry.main()
    assert sys.argv == ["secateur", "run", "job.yaml"]
    assert "versions here differ from those where it was submitted: pyyaml" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_the_look() -> None:
    code = "import sys, cluster.entry; print(sorted({'torch', 'ray', 'transformers', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun", flush=True)
time.sleep(60)
"""


def pretend_job(tmp_path: Path, job: str, code: str) -> subprocess.Popen[str]:
    """A process with the command line of a job, which does something else."""
    (tmp_path / "cluster").mkdir(exist_ok=True)
    (tmp_path / "cluster" / "entry.py").write_text(code)
    command = [sys.executable, "-m", "cluster.entry", "run", job]
    process = subprocess.Popen(command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_the_process_of_a_job_is_ended_even_where_it_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "PATIENCE", 0.2)
    with pretend_job(tmp_path, "secateur-a-1", STUBBORN) as process, pretend_job(tmp_path, "other", STUBBORN) as other:
        try:
            monkeypatch.setattr("sys.argv", ["entry", "end", "secateur-a-1"])
            entry.main()
            assert process.wait(timeout=30) == -9
            assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
            assert other.poll() is None
        finally:
            process.kill()
            other.kill()


def test_a_job_without_a_process_here_is_said_to_have_none() -> None:
    with pytest.raises(SystemExit, match=r"no process of secateur-none-0 runs on this machine"):
        entry.end("secateur-none-0")
