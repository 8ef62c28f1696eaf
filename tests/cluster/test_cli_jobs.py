"""The commands about jobs, as their users call them, against a job server in memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli_jobs, follow
from tests.cluster.fake_jobs import FakeJobs, some_facts
from tests.integration.support import run_command

Call = Callable[..., tuple[int, str, str]]
JOB = "secateur-a-name-that-would-not-fit-into-a-narrow-terminal-0123abcd"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    """What every command connects to; it has one job, which has just begun."""
    found = FakeJobs(some_facts(JOB))
    found.pieces = ["prune: block 1/3\n", "prune: block 2/3\n"]
    monkeypatch.setattr(cli_jobs, "connect", lambda address: found)
    monkeypatch.setattr(follow, "SILENCE_SECONDS", 0.02)
    return found


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = run_command(arguments, monkeypatch)
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": "/models/llama", "output": "/runs/new"}))
    return path


def test_a_detached_submission_returns_at_once_with_the_way_to_the_job(
    call: Call, config: Path, server: FakeJobs
) -> None:
    status, output, said = call("submit", config, "--detach", "--json", "--grace", "7", "--set", "output=/runs/other")
    assert status == 0
    facts = json.loads(output)
    assert (facts["status"], facts["output"]) == ("pending", "/runs/other")
    assert f"secateur logs {facts['job']} --follow --address http://head:8265" in said
    assert server.submitted[0].environment["RAY_JOB_STOP_WAIT_TIME_S"] == "7"


@pytest.mark.parametrize(
    ("end", "exit_status", "status"),
    [("succeeded", 0, 0), ("failed", 3, 3), ("failed", None, 1), ("stopped", None, 75)],
)
def test_a_submission_that_waits_shows_the_log_and_ends_as_the_job_does(
    end: Any, exit_status: int | None, status: int, call: Call, config: Path, server: FakeJobs
) -> None:
    def finish(server: FakeJobs) -> None:
        server.finish(server.submitted[0].job, end, exit_status)

    server.on_poll = finish
    found, output, said = call("submit", config, "--json")
    assert (found, json.loads(output)["status"]) == (status, end)
    assert "prune: block 1/3\nprune: block 2/3\n" in said


@pytest.mark.parametrize("command", [["submit"], ["logs", "--follow", JOB], ["stop", JOB]], ids=lambda c: str(c[0]))
def test_an_interrupted_command_leaves_the_job_alone_and_says_so(
    command: list[str], call: Call, config: Path, server: FakeJobs
) -> None:
    def interrupt(server: FakeJobs) -> None:
        if command[0] != "stop" or server.asked:
            raise KeyboardInterrupt

    server.on_poll = interrupt
    status, _, said = call(*command, *([config] if command == ["submit"] else []))
    assert status == 130
    assert server.asked == ([JOB] if command[0] == "stop" else [])
    assert ("was asked to stop, and will" if command[0] == "stop" else "goes on without this command") in said


def test_a_list_shows_whole_names_for_they_are_what_other_commands_take(call: Call, server: FakeJobs) -> None:
    status, output, said = call("list")
    assert (status, output) == (0, "")
    assert JOB in said
    assert "running" in said
    assert json.loads(call("list", "--json")[1])["jobs"][0]["job"] == JOB


def test_a_status_tells_what_a_job_said_last(call: Call, server: FakeJobs) -> None:
    status, output, said = call("status", "secateur-a", "--json")
    assert status == 0
    assert said.splitlines()[-1] == json.loads(output)["last"] == "prune: block 2/3"
    server.known[JOB] = replace(server.known[JOB], status="failed", message="exit code 1")
    assert f"{JOB} has failed: exit code 1" in call("status", JOB)[2]


def test_a_log_goes_to_standard_output(call: Call, server: FakeJobs) -> None:
    assert call("logs", JOB)[:2] == (0, "prune: block 1/3\nprune: block 2/3\n")
    server.on_poll = lambda server: server.finish(JOB, "succeeded")
    status, output, said = call("logs", JOB, "-f")
    assert (status, output) == (0, "prune: block 1/3\nprune: block 2/3\n")
    assert f"{JOB} has succeeded" in said


def test_a_stop_reports_the_end(call: Call, server: FakeJobs) -> None:
    server.on_poll = lambda server: server.asked and server.finish(JOB, "stopped")
    status, output, said = call("stop", JOB, "--json")
    assert (status, json.loads(output)["status"]) == (0, "stopped")
    assert f"{JOB} was stopped: submit the same configuration again" in said


def test_without_ray_the_way_to_install_it_is_told(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_jobs, "find_spec", lambda name: None)
    status, _, said = call("list", "--address", "http://head:8265")
    assert status == 1
    assert "jobs on a cluster need ray, which is not installed; pip install 'secateur[cluster]'" in said


def test_commands_about_jobs_answer_at_once_for_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "transformers", "datasets", "pydantic", "ray", "apscheduler"}
    code = f"import sys, cluster.cli; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
