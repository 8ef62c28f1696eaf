"""Submitting and stopping, against a job server in memory; a real one is in tests/integration/test_submit.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import submit as submitting
from cluster.submit import Wishes, explain, stop, submit
from pipeline.config import RunConfig, parse_config, resolved
from pipeline.errors import ClusterUnreachable, ConfigError, SubmissionError
from tests.cluster.fake_jobs import LOST, FakeJobs, some_facts

JOB = "secateur-a-1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(submitting, "LATE_SECONDS", 0.05)


def config(**sections: Any) -> RunConfig:
    return parse_config({"model": "/models/llama", "output": "/runs/a", **sections}, "the test")


def submitted(server: FakeJobs, settings: RunConfig, wishes: Wishes | None = None) -> tuple[str, str]:
    said: list[str] = []
    return submit(server, resolved(settings), wishes or Wishes(), said.append), "\n".join(said)


def test_a_job_carries_its_wishes_and_nothing_of_the_environment() -> None:
    server = FakeJobs()
    job, _ = submitted(server, config(), Wishes(grace=90.0, gpus=1.0, python="/opt/my python", install=True))
    (submission,) = server.submitted
    assert submission.entrypoint == f"exec '/opt/my python' -m cluster.entry run {job}"
    assert submission.environment == {"RAY_JOB_STOP_WAIT_TIME_S": "90"}
    assert submission.metadata.keys() == {"secateur", "secateur_output", "secateur_grace", "secateur_python"}
    assert (submission.gpus, submission.cpus, submission.node) == (1.0, None, None)
    names = {pin.partition("==")[0] for pin in submission.install}
    assert "torch" in names
    assert "ray" not in names


def test_a_job_belongs_to_the_cluster_it_is_submitted_to() -> None:
    seen: list[str] = []

    class Reading(FakeJobs):
        def submit(self, submission: Any) -> None:
            seen.append((submission.settings / "job.yaml").read_text())
            super().submit(submission)

    _, said = submitted(Reading(), config(cluster={"address": "local", "stages": 2}))
    assert "address: auto" in seen[0]
    assert "stages: 2" in seen[0]
    assert said == "cluster.address is local; a submitted job takes the cluster it is submitted to"
    _, said = submitted(Reading(), config())
    assert "the settings have no `cluster` section: one process does all" in said
    assert "cluster:" not in seen[1]


def test_settings_with_a_token_in_them_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    server = FakeJobs()
    with pytest.raises(ConfigError, match=r"hold the value of HF_TOKEN"):
        submitted(server, config(model="/models/hf_0123456789"))
    assert server.submitted == []


@pytest.mark.parametrize("status", ["pending", "running"])
def test_a_second_job_in_a_run_directory_is_refused(status: Any) -> None:
    with pytest.raises(SubmissionError, match=rf"{JOB} is {status} in /runs/a, and one job at a time may work there"):
        submitted(FakeJobs(some_facts(status=status)), config())


def test_a_run_directory_is_free_again_once_its_job_is_over() -> None:
    others = some_facts(status="stopped"), some_facts("secateur-b-1", output="/runs/b")
    assert submitted(FakeJobs(*others), config())[0].startswith("secateur-a-")


def test_a_submission_whose_answer_is_lost_is_not_repeated() -> None:
    server = FakeJobs()
    server.lose = LOST
    job, _ = submitted(server, config())
    assert [submission.job for submission in server.submitted] == [job]


def test_a_submission_of_which_nothing_is_known_says_so() -> None:
    class Deaf(FakeJobs):
        def submit(self, submission: Any) -> None:
            raise LOST

    with pytest.raises(ClusterUnreachable, match=r"(?s)was lost.*whether secateur-a-\w+ was taken on is not known"):
        submitted(Deaf(), config())


def test_a_stop_waits_for_the_safe_point() -> None:
    said: list[str] = []
    server = FakeJobs(some_facts(), on_poll=lambda server: server.asked and server.finish(JOB, "stopped"))
    assert stop(server, JOB, said.append).status == "stopped"
    assert server.asked == [JOB]
    assert said[0].startswith(f"{JOB} stops once the block at hand is committed, at the latest in 5 s")
    assert server.submitted == []


def test_a_job_that_is_over_is_not_stopped() -> None:
    said: list[str] = []
    server = FakeJobs(some_facts(status="succeeded"))
    assert stop(server, JOB, said.append).status == "succeeded"
    assert (server.asked, said) == ([], [f"{JOB} is over already: succeeded"])


def test_a_stop_that_takes_too_long_is_given_up_with_the_way_out() -> None:
    server = FakeJobs(replace(some_facts(status="pending"), grace=0.0))
    with pytest.raises(SubmissionError, match=r"still pending after 0.05 s; .*secateur stop --now"):
        stop(server, JOB, lambda text: None)


def test_a_stop_at_once_ends_the_process_on_its_node_and_leaves_no_trace() -> None:
    server = FakeJobs(some_facts(), on_poll=lambda server: server.submitted and server.finish(JOB, "stopped"))
    assert stop(server, JOB, lambda text: None, at_once=True).status == "stopped"
    (ending,) = server.submitted
    assert ending.entrypoint == f"exec python -m cluster.entry end {JOB}"
    assert (ending.node, ending.settings, ending.metadata) == ("node-1", None, {})
    assert (server.asked, server.forgotten) == ([JOB], [ending.job])


def test_a_stop_at_once_that_finds_no_process_says_when_the_job_ends() -> None:
    def end_in_vain(server: FakeJobs) -> None:
        for submission in server.submitted:
            server.finish(submission.job, "failed", 1)

    with pytest.raises(SubmissionError, match=r"its process was not found to be ended at once; .* latest in 5 s"):
        stop(FakeJobs(some_facts(), on_poll=end_in_vain), JOB, lambda text: None, at_once=True)


def test_every_end_is_explained() -> None:
    assert explain(some_facts(status="succeeded")).endswith("its model is in /runs/a/model on the cluster")
    again = "submit the same configuration again, and it goes on from what is committed in /runs/a"
    assert explain(some_facts(status="stopped")) == f"{JOB} was stopped: {again}"
    failed = replace(some_facts(status="failed"), message="exit code 1, last logs:\nTraceback")
    assert explain(failed).splitlines()[0] == f"{JOB} has failed: exit code 1, last logs:"
    assert explain(failed).endswith(again)
    assert "no reason was given" in explain(replace(failed, message=""))


def test_staged_files_are_gone_once_the_job_is_sent() -> None:
    server = FakeJobs()
    submitted(server, config())
    settings = server.submitted[0].settings
    assert settings is not None
    assert not Path(settings).parent.exists()
