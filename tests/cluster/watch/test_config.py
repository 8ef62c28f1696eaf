"""A watch configuration: what it may say, and what is wrong with it, all at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.watch.config import WatchConfig, load_watch_config, parse_duration
from cluster.watch.state import Limits
from pipeline.config import validated
from pipeline.errors import ConfigError
from tests.cluster.watch.watching import settings


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    return settings(tmp_path, tmp_path / "text.txt")


def problems(plain: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        validated(WatchConfig, plain, "watch.yaml")
    return refused.value.message


def test_an_outage_of_a_night_quarantines_nothing_unless_asked(plain: dict[str, Any]) -> None:
    del plain["retry"]
    policy = validated(WatchConfig, plain, "the test").retry_policy
    assert sum(policy.wait(failures) for failures in range(1, policy.attempts)) > 8 * 3600


def test_a_file_is_read_with_its_paths_made_absolute(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain |= {"state": "here/state.db", "sources": [{"directory": "models"}], "publish": {"directory": "out"}}
    plain |= {"limits": {"jobs": 2, "disk": "10GB"}, "retry": {"first_wait": "2m", "longest_wait": "1m"}}
    Path("watch.yaml").write_text(yaml.safe_dump(plain))
    config = load_watch_config(Path("watch.yaml"))
    assert config.state == tmp_path / "here" / "state.db"
    assert config.sources[0].directory == tmp_path / "models"
    assert config.publish.directory == tmp_path / "out"
    assert config.ceilings == Limits(jobs=2, disk_bytes=10**10)
    assert (config.retry_policy.first_wait, config.retry_policy.longest_wait) == (120.0, 120.0)


def test_the_job_of_a_release_has_its_model_and_output(plain: dict[str, Any], tmp_path: Path) -> None:
    run = validated(WatchConfig, plain, "watch.yaml").run_config(tmp_path / "model", tmp_path / "run")
    assert (run.model.path, run.output) == (tmp_path / "model", tmp_path / "run")
    assert run.prune.recipe == ("magnitude",)


def test_what_a_reader_is_told_of_the_job_names_no_path(plain: dict[str, Any], tmp_path: Path) -> None:
    recipe = validated(WatchConfig, plain, "watch.yaml").recipe()
    assert recipe.keys() == {"prune", "compute"}
    assert str(tmp_path) not in str(recipe)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("6h", 21_600), ("30d", 2_592_000), ("2w", 1_209_600), (5, 5)]
)
def test_durations_have_units(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"sources": []}, "sources: "),
        ({"sources": [{}]}, "sources.0: give exactly one of `organisation`, `model` and `directory`"),
        ({"sources": [{"model": "a/b", "organisation": "a"}]}, "sources.0: give exactly one of"),
        ({"filters": {"include": ["("]}}, "filters.include: '(' is no regular expression"),
        ({"filters": {"max_age": "soon"}}, "filters.max_age: "),
        ({"filters": {"licenses": []}}, "filters.licenses: unknown key; did you mean 'licences'?"),
        ({"schedule": {}}, "schedule: give either `every` (an interval) or `cron` (five fields)"),
        ({"schedule": {"every": "0s"}}, "schedule.every: "),
        ({"publish": {}}, "publish: give either `directory` or `repository`"),
        ({"publish": {"repository": "me/pruned"}}, "publish: `repository` must have {name} in it"),
        ({"publish": {"repository": "me/{name}/{x}"}}, "publish: `repository` is no name of a repository"),
        ({"publish": {"repository": "me/{name}/b"}}, "publish: `repository` is no name of a repository"),
        ({"webhook": {}}, "webhook: give either `url` or `url_from`"),
        ({"webhook": {"url": "http://x", "events": ["born"]}}, "webhook: unknown events born; known: published"),
        ({"gate": {"lm_eval": {"tasks": {}}}}, "gate.lm_eval.tasks: "),
        ({"limits": {"jobs": 0}}, "limits.jobs: "),
        ({"token": "hf_x"}, "token: unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_key_path(
    changes: dict[str, Any], fact: str, plain: dict[str, Any]
) -> None:
    assert fact in problems(plain | changes)


def test_an_address_may_stand_for_the_whole_webhook_and_is_in_no_message(plain: dict[str, Any]) -> None:
    config = validated(WatchConfig, plain | {"webhook": "https://example.org/secret"}, "the test")
    assert config.webhook is not None
    assert config.webhook.url == "https://example.org/secret"
    assert "secret" not in problems(plain | {"webhook": "https://example.org/secret", "limits": {"jobs": 0}})


def test_problems_of_the_job_are_told_with_the_others(plain: dict[str, Any]) -> None:
    plain["job"]["prune"]["sparsity"] = 7
    plain["job"]["calibrate"] = {}
    message = problems(plain)
    assert "job: prune.sparsity: " in message
    assert "job: calibrate: unknown key; did you mean 'calibration'?" in message


def test_the_job_leaves_model_and_output_to_each_release(plain: dict[str, Any]) -> None:
    plain["job"] |= {"model": "here", "output": "there"}
    assert "`job` must not have model and output: each release has its own" in problems(plain)


def test_a_gate_on_perplexity_needs_an_evaluation(plain: dict[str, Any]) -> None:
    del plain["job"]["evaluate"]
    assert "the gate looks at perplexity, so `job` needs an `evaluate` section" in problems(plain)
