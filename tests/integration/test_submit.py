"""Jobs on a real Ray head over HTTP: from elsewhere, without their client, stopped, ended, and going on."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from pipeline.ledger import LEDGER_NAME, Ledger, RunLock
from tests.integration.clusters import COMPUTE, NUM_BLOCKS, six_blocks, spread
from tests.integration.processes import PATIENCE
from tests.integration.ray_heads import Head, bare_environment, environment_with_wheel, forget_token, ray_head
from tests.integration.support import RecipeEntries, carry_out, digests, job, outcome, run_command

SLOW: RecipeEntries = ({"besa": {"epochs": 24}},)
"""A block takes long enough for a command to come between."""

ENDLESS: RecipeEntries = ({"besa": {"epochs": 10_000_000}},)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command of an environment in which a wheel is installed."""
    return str(Path(environment_with_wheel(tmp_path_factory.mktemp("client"))).with_name("secateur"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as found:
        yield found


@pytest.fixture
def address(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the cluster, whose token this process has, and where another is named beside."""
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    yield head.address
    forget_token()


def environment_of(head: Head) -> dict[str, str]:
    return bare_environment() | {"RAY_AUTH_TOKEN_PATH": str(head.token_file), "OMP_NUM_THREADS": "1"}


def settings_of(source: Path, output: Path, recipe: RecipeEntries) -> dict[str, Any]:
    return job(source, output, recipe, compute=COMPUTE, evaluate=None)


def configuration(settings: dict[str, Any], directory: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def jobs_of(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run_command(["list", "--address", address, "--json"], monkeypatch) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["jobs"]
    return found


def wait_until_pruning(run_directory: Path, num_blocks: int) -> None:
    """Wait until so many blocks are committed."""
    deadline = time.monotonic() + PATIENCE
    while not (run_directory / LEDGER_NAME).exists() or len(Ledger.read(run_directory).commits) < num_blocks:
        assert time.monotonic() < deadline, "the job does not get on"
        time.sleep(0.05)


def test_the_cluster_has_no_code_of_ours(head: Head) -> None:
    python = str(head.token_file.parent / "cluster-venv" / "bin" / "python")
    code = "import torch, ray, importlib.util as u; assert not u.find_spec('pipeline') and not u.find_spec('cluster')"
    done = subprocess.run([python, "-c", code], cwd=head.token_file.parent, env=bare_environment(), check=False)
    assert done.returncode == 0


def test_a_job_from_another_environment_makes_the_bytes_of_a_local_run(
    client: str, head: Head, source: Path, tmp_path: Path
) -> None:
    settings = settings_of(source, tmp_path / "there", ("wanda",))
    config = configuration(settings, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "private.txt").write_text("not for the cluster")
    command = [client, "submit", str(config), "--address", head.address, "--json"]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment_of(head), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["output"]) == ("succeeded", str(tmp_path / "there"))
    assert f"prune: block {NUM_BLOCKS}/{NUM_BLOCKS} " in done.stderr  # the log of the job
    carry_out({**settings, "output": str(tmp_path / "here")})
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")


def test_a_job_goes_on_when_its_client_is_killed(
    client: str, head: Head, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], address: str,
) -> None:  # fmt: skip
    settings = settings_of(source, tmp_path / "there", SLOW)
    config = configuration(settings, tmp_path)
    command = [client, "submit", str(config), "--address", head.address]
    with subprocess.Popen(command, cwd=tmp_path, env=environment_of(head), stderr=subprocess.DEVNULL) as process:
        wait_until_pruning(tmp_path / "there", 1)
        process.kill()
    (facts,) = [each for each in jobs_of(address, monkeypatch, capsys) if each["output"] == str(tmp_path / "there")]
    assert facts["status"] == "running"
    assert run_command(["logs", facts["job"], "--follow", "--address", address], monkeypatch) == 0
    log = capsys.readouterr().out
    assert log.count(f"prune: block 1/{NUM_BLOCKS} ") == 1
    carry_out({**settings, "output": str(tmp_path / "here")})
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")


def test_a_job_over_workers_that_was_stopped_and_submitted_again_makes_the_bytes_of_a_local_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    settings = settings_of(source, tmp_path / "there", SLOW)
    config = configuration(spread(settings, stages=2), tmp_path)
    assert run_command(["submit", config, "--address", address, "--detach", "--json"], monkeypatch) == 0
    name = json.loads(capsys.readouterr().out)["job"]
    wait_until_pruning(tmp_path / "there", 1)
    assert run_command(["submit", config, "--address", address], monkeypatch) == 1
    assert f"{name} is running in {tmp_path / 'there'}, and one job at a time may work there" in capsys.readouterr().err
    assert run_command(["stop", name[-8:], "--address", address, "--json"], monkeypatch) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["status"] == "stopped"
    assert f"{name} was stopped: submit the same configuration again" in said.err
    assert 1 <= len(Ledger.read(tmp_path / "there").commits) < NUM_BLOCKS
    assert run_command(["logs", name, "--address", address], monkeypatch) == 0
    log = capsys.readouterr().out
    assert "2 stages of 3 blocks x 1 replica" in log
    assert "stopping once this block is committed" in log
    assert run_command(["submit", config, "--address", address], monkeypatch) == 0
    assert "blocks are committed; going on from there" in capsys.readouterr().err
    carry_out({**settings, "output": str(tmp_path / "here")})
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")


@pytest.mark.parametrize(
    ("submitted", "stopped"), [([], ["--now"]), (["--grace", "1"], [])], ids=["as asked", "after its grace"]
)
def test_a_job_is_ended_in_the_middle_of_a_block(
    submitted: list[str], stopped: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], address: str,
) -> None:  # fmt: skip
    config = configuration(spread(settings_of(source, tmp_path / "there", ENDLESS), stages=2), tmp_path)
    assert run_command(["submit", config, "--address", address, "--detach", "--json", *submitted], monkeypatch) == 0
    name = json.loads(capsys.readouterr().out)["job"]
    wait_until_pruning(tmp_path / "there", 0)
    before = jobs_of(address, monkeypatch, capsys)
    assert run_command(["stop", name, "--address", address, "--json", *stopped], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "stopped"
    assert len(jobs_of(address, monkeypatch, capsys)) == len(before)  # no trace of what ended it
    assert run_command(["status", name, "--address", address], monkeypatch) == 0
    assert f"{name} was stopped" in capsys.readouterr().err
    assert run_command(["stop", name, "--address", address], monkeypatch) == 0
    assert f"{name} is over already: stopped" in capsys.readouterr().err
    with RunLock(tmp_path / "there"):  # nobody works there any more
        assert Ledger.read(tmp_path / "there").commits == {}


def test_a_release_is_pruned_by_one_job_though_its_watcher_is_killed(
    client: str, head: Head, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], address: str,
) -> None:  # fmt: skip
    settings = settings_of(source, tmp_path / "here", SLOW)
    watch = {
        "state": str(tmp_path / "state.db"),
        "work": str(tmp_path / "work"),
        "settle": 0,
        "sources": [{"directory": str(source.parent)}],
        "submit": {"address": address},
        "publish": {"directory": str(tmp_path / "published")},
        "job": {key: value for key, value in settings.items() if key not in ("model", "output")},
    }
    config = configuration(watch, tmp_path)
    num_before, environment = len(jobs_of(address, monkeypatch, capsys)), environment_of(head)
    with subprocess.Popen([client, "watch", str(config), "--once"], cwd=tmp_path, env=environment) as process:
        while not (runs := list((tmp_path / "work").glob("*/run"))):
            assert process.poll() is None
            time.sleep(0.05)
        wait_until_pruning(runs[0], 1)
        process.kill()
    assert run_command(["watch", config, "--once"], monkeypatch) == 0
    said = capsys.readouterr().err
    assert "submitted" not in said
    assert f"published: {tmp_path / 'published'}" in said
    assert len(jobs_of(address, monkeypatch, capsys)) == num_before + 1
    carry_out(settings)
    (published,) = (tmp_path / "published").glob("source/*")
    assert digests(published).items() >= digests(tmp_path / "here" / "model").items()


def test_a_job_that_fails_gives_its_exit_status_and_its_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    config = configuration(settings_of(tmp_path / "nowhere", tmp_path / "there", ("wanda",)), tmp_path)
    command = ["submit", config, "--address", address, "--json", "--set", f"calibration.source.text={source}"]
    assert run_command(command, monkeypatch) == 1
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert (facts["status"], facts["exit_status"]) == ("failed", 1)
    assert f"error: {tmp_path / 'nowhere'}" in said.err
    assert f"{facts['job']} has failed: Job entrypoint command failed with exit code 1" in said.err


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"RAY_AUTH_TOKEN": "of-another-cluster"},
            "does not take the token in RAY_AUTH_TOKEN; put the cluster's token",
        ),
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "of-another-cluster"},
            "asks for a token, and RAY_AUTH_MODE=disabled keeps it back",
        ),
        (
            {"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"},
            "asks for a token, and there is none here; put the cluster's",
        ),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_explained(
    environment: dict[str, str], told: str, address: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_command(["list", "--address", address], monkeypatch) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "of-another-cluster" not in said


def test_no_job_and_no_log_holds_the_token(head: Head, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = list(Path(head.directory).rglob("*.log"))
    assert any(path.name.startswith("job-driver-secateur") for path in logs)
    assert [path for path in logs if head.token.encode() in path.read_bytes()] == []
    listed = urlopen(Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})).read()
    assert b"cluster.entry run" in listed
    assert head.token.encode() not in listed
    assert b"private.txt" not in listed
