"""Tasks of lm-eval on a model directory; the one file that knows how that library is called."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster.watch.gate_config import TasksConfig
from pipeline.block_widths import widths_written
from pipeline.checkpoint import Checkpoint
from pipeline.devices import choose_device
from pipeline.errors import ConfigError, NumericsError
from pipeline.uneven import load


def evaluate_tasks(model: Path, config: TasksConfig, device: str) -> dict[str, float]:
    """Return each task's value of its metric; the whole model is in the device's memory meanwhile.

    Raises ConfigError where lm-eval, a task or its metric is not there, NumericsError where a value is not finite.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("gate.lm_eval needs lm-eval: pip install 'secateur[tasks]'") from None
    manager = TaskManager(include_path=None if config.directory is None else str(config.directory))
    missing = [name for name in config.tasks if name not in manager.all_tasks]
    if missing:
        raise ConfigError(f"gate.lm_eval.tasks: lm-eval knows no {', '.join(missing)}; see `directory` for your own")
    found = simple_evaluate(
        model="hf",
        model_args=_model_args(model, device),
        tasks=list(config.tasks),
        task_manager=manager,
        batch_size=config.batch,
        device=str(choose_device(device)),
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: value_of(found["results"][name], name, task.metric) for name, task in config.tasks.items()}


def _model_args(model: Path, device: str) -> dict[str, Any]:
    """Return what lm-eval is to load; where it cannot, for blocks have widths of their own, what we have loaded."""
    with closing(Checkpoint.open(model)) as checkpoint:
        if widths_written(checkpoint.settings()) is None:
            return {"pretrained": str(model), "trust_remote_code": False}
    return {"pretrained": load(model, device=choose_device(device)), "tokenizer": str(model)}


def value_of(results: dict[str, object], task: str, metric: str) -> float:
    """Return a metric, which lm-eval names together with its filter (`acc,none`); raises as `evaluate_tasks`."""
    named = {key.partition(",")[0]: value for key, value in reversed(results.items()) if isinstance(value, int | float)}
    if metric not in named:
        known = ", ".join(sorted(key for key in named if not key.endswith("_stderr")))
        raise ConfigError(f"gate.lm_eval.tasks.{task}: lm-eval measured no {metric!r}; it measured: {known}")
    value = float(named[metric])
    if not math.isfinite(value):
        raise NumericsError(f"{task} {metric} is {value}: the model's outputs hold NaN or Inf")
    return value
