"""Whether a pruned model is good enough to be published: every check is made, and all that fail are named."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from cluster.watch.gate_config import GateConfig, TasksConfig
from cluster.watch.tasks import evaluate_tasks
from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig
from pipeline.errors import GateFailed
from pipeline.human import human_bytes
from pipeline.progress import Silent
from pipeline.report import REPORT
from pipeline.verify import verify

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    value: str
    limit: str
    """What was asked of it; empty where it is told and nothing was asked."""

    ok: bool


def pass_gate(gate: GateConfig, run: RunConfig) -> dict[str, Any]:
    """Check a finished run; return its report's figures and all checks as plain data.

    Raises GateFailed where a check fails, VerificationError where the files are not what the ledger says.
    """
    assert run.model.path is not None
    report = json.loads((run.output / "report" / REPORT).read_bytes())
    checks = [*_blocks(report), *_sparsity(gate, run, report), *_perplexity(gate, report)]
    if gate.verify:
        checks.append(_verified(run.output, run.model.path))
    if gate.lm_eval is not None and all(check.ok for check in checks):  # it takes long
        checks += _tasks(gate.lm_eval, run)
    failed = [f"{check.name} is {check.value}, asked was {check.limit}" for check in checks if not check.ok]
    if failed:
        raise GateFailed(f"the pruned model failed {len(failed)} of {len(checks)} checks: {'; '.join(failed)}")
    kept = ("sparsity", "achieved_sparsity", "pruned_weights", "prunable_weights", "perplexity_before",
            "perplexity_after", "mean_error", "seconds", "guidance", "smaller")  # fmt: skip
    return {"report": {name: report[name] for name in kept}, "checks": [asdict(check) for check in checks]}


def _blocks(report: Mapping[str, Any]) -> Iterator[Check]:
    """Where blocks are gone: whole ones, so that the last of what was asked may stay, or others make up for it.

    How many neurons are left is part of `verify`.
    """
    smaller = report["smaller"]
    if smaller is None:
        return
    blocks, asked = smaller["blocks"], smaller["asked"]
    num_blocks, most = blocks["of"], floor(Fraction(repr(asked)) * blocks["of"])
    # `most` is counted from the decimals that were asked for: 0.58 * 50 is less than 29 in floats.
    gone = num_blocks - smaller["num_blocks"]
    rest = "neurons" if blocks.get("width") is not None else "attentions" if "attentions_silenced" in blocks else None
    yield Check(
        name="blocks", value=f"{gone} of {num_blocks} gone",
        limit=f"{asked:.4%} of them, " + (f"with {rest} of the others" if rest else "rounded down"),
        ok=gone == most or (rest is not None and gone < most),
    )  # fmt: skip


def _sparsity(gate: GateConfig, run: RunConfig, report: Mapping[str, Any]) -> Iterator[Check]:
    """Where weights are masked."""
    if not report["prunable_weights"]:
        return
    asked, found = float(run.prune.target.fraction), report["achieved_sparsity"]
    yield Check(
        name="sparsity", value=f"{found:.4%}", limit=f"{asked:.4%} within {gate.sparsity_tolerance:.4%}",
        ok=abs(found - asked) <= gate.sparsity_tolerance,
    )  # fmt: skip


def _perplexity(gate: GateConfig, report: Mapping[str, Any]) -> Iterator[Check]:
    before, after = report["perplexity_before"], report["perplexity_after"]
    if gate.perplexity_ratio is not None:
        ratio = after / before
        limit = f"at most {gate.perplexity_ratio:g}"
        yield Check(name="perplexity ratio", value=f"{ratio:.4f}", limit=limit, ok=ratio <= gate.perplexity_ratio)
    if gate.max_perplexity is not None:
        limit = f"at most {gate.max_perplexity:g}"
        yield Check(name="perplexity", value=f"{after:.4f}", limit=limit, ok=after <= gate.max_perplexity)


def _verified(run_directory: Path, source: Path) -> Check:
    found = verify(run_directory, source, Silent())
    with closing(Checkpoint.open(run_directory / "model")) as checkpoint:
        size = human_bytes(checkpoint.total_bytes())
    value = f"{found.tensors} tensors ({size}) compared, {found.identical_tensors} identical to the source"
    return Check(name="verify", value=value, limit="", ok=True)


def _tasks(config: TasksConfig, run: RunConfig) -> Iterator[Check]:
    """Evaluate tasks, each model in a process of its own, which gives its memory back."""
    assert run.model.path is not None
    after = in_own_process(evaluate_tasks, run.output / "model", config, run.compute.device)
    needs_dense = any(task.max_drop is not None for task in config.tasks.values())
    before = in_own_process(evaluate_tasks, run.model.path, config, run.compute.device) if needs_dense else {}
    for name, task in config.tasks.items():
        value, title = after[name], f"{name} {task.metric}"
        if task.min is None and task.max_drop is None:
            yield Check(name=title, value=f"{value:.4f}", limit="", ok=True)
        if task.min is not None:
            yield Check(name=title, value=f"{value:.4f}", limit=f"at least {task.min:g}", ok=value >= task.min)
        if task.max_drop is not None:
            limit = f"at least {before[name]:.4f} (dense) less {task.max_drop:g}"
            yield Check(name=title, value=f"{value:.4f}", limit=limit, ok=value >= before[name] - task.max_drop)


def in_own_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function returns in a process of its own, which leaves signals to the watcher and dies with it."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_belong_to_parent) as pool:
        return pool.submit(work, *arguments).result()


def _belong_to_parent() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's death: a pool's process would not notice it, and keep its memory for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
