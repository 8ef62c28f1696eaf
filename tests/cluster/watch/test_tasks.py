"""Tasks of lm-eval on tiny models, from task data of this directory: no network."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from cluster.watch.gate import pass_gate
from cluster.watch.gate_config import GateConfig, TasksConfig
from cluster.watch.tasks import evaluate_tasks, value_of
from pipeline.config import parse_config
from pipeline.errors import ConfigError, GateFailed, NumericsError
from tests.cluster.watch.watching import copied
from tests.integration.support import carry_out, job

TASK = {
    "task": "local_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one task and its data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"{index} is ", "answer": index % 2} for index in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tasks / "local_choice.yaml").write_text(yaml.safe_dump(task))
    return tasks


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a tokenizer that ends its texts, as lm-eval needs; the text lies beside it."""
    copy = copied(tiny, tmp_path / "model")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>", "eos_token": "</s>"}))
    shutil.copy(tiny.parent / "text.txt", tmp_path)
    return copy


def asked(directory: Path, **task: object) -> TasksConfig:
    return TasksConfig.model_validate({"directory": directory, "batch": 4, "tasks": {"local_choice": task}})


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_model_is_held_against_the_dense_one_in_tasks_of_ones_own(
    model: Path, directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    settings = job(model, tmp_path / "run", recipe=["magnitude"])
    carry_out(settings)
    run = parse_config(settings, "the test")
    gate = GateConfig(lm_eval=asked(directory, min=1.5, max_drop=1.0))
    with pytest.raises(
        GateFailed, match=r"failed 1 of 4 checks: local_choice acc is (\S+), asked was at least 1.5$"
    ) as failed:
        pass_gate(gate, run)
    value = float(failed.value.message.partition("acc is ")[2].partition(",")[0])
    assert value in {index / 8 for index in range(9)}


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_blocks_differ_in_width_does_tasks_too(model: Path, directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    carry_out(job(model, tmp_path / "run", recipe=[{"comp": {"widths": "per_block"}}], sparsity=0.3))
    found = evaluate_tasks(tmp_path / "run" / "model", asked(directory), "cpu")
    assert found["local_choice"] in {index / 8 for index in range(9)}


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_said(model: Path, directory: Path) -> None:
    pytest.importorskip("lm_eval")
    wrong = TasksConfig.model_validate({"directory": directory, "tasks": {"no_such_task": {}}})
    with pytest.raises(ConfigError, match="lm-eval knows no no_such_task; see `directory` for your own"):
        evaluate_tasks(model, wrong, "cpu")


def test_a_metric_is_read_under_its_filters_name() -> None:
    results: dict[str, object] = {"alias": "t", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc,strict": 0.5}
    assert value_of(results, "t", "acc") == 0.25


def test_a_metric_that_was_not_measured_or_is_no_number_is_said() -> None:
    with pytest.raises(ConfigError, match=r"gate\.lm_eval\.tasks\.t: lm-eval measured no 'f1'; it measured: acc"):
        value_of({"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t"}, "t", "f1")
    with pytest.raises(NumericsError, match="t acc is nan: the model's outputs hold NaN or Inf"):
        value_of({"acc,none": float("nan")}, "t", "acc")


def test_without_lm_eval_the_way_to_it_is_said(tiny: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"gate.lm_eval needs lm-eval: pip install 'secateur\[tasks\]'"):
        evaluate_tasks(tiny, asked(directory), "cpu")
