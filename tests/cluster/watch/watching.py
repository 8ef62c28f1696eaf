"""Watchers of tiny models, set up in a directory of their own."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from cluster.watch.config import WatchConfig
from cluster.watch.hub import new_api
from cluster.watch.lifecycle import Release
from cluster.watch.pruning import Pruner, RunHere
from cluster.watch.state import Clock
from cluster.watch.watcher import Watcher
from pipeline.config import RunConfig, absolute, validated
from pipeline.progress import Silent, StopAsked
from pipeline.run import run


def settings(base: Path, text: Path, **sections: Any) -> dict[str, Any]:
    """A watch on the hub's acme, as plain data; `sections` replace or join it."""
    source = {"text": str(text)}
    return {
        "state": str(base / "state.db"),
        "work": str(base / "work"),
        "sources": [{"organisation": "acme"}],
        "job": {
            "prune": {"recipe": ["magnitude"], "sparsity": 0.5},
            "calibration": {"source": source, "sequences": 2, "tokens": 16},
            "evaluate": {**source, "sequence_length": 16, "windows": 2},
            "compute": {"device": "cpu", "threads": 1},
        },
        "gate": {"perplexity_ratio": 2.0},
        "publish": {"repository": "me/{name}-{sparsity}"},
        "retry": {"attempts": 3, "first_wait": 60.0},
    } | sections


class InThisProcess:
    """Prunes where the watcher is, so that a test may look on."""

    def __init__(self, run: RunHere) -> None:
        self._run = run

    def __call__(self, config: RunConfig, log: Path, stop_asked: StopAsked) -> None:
        """Run to the end."""
        self._run(config, Silent(), stop_asked)


class Watch:
    """One watcher, and what it says."""

    def __init__(
        self,
        plain: dict[str, Any],
        clock: Clock,
        pruner: Pruner | None = None,
        api: HfApi | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = absolute(validated(WatchConfig, plain, "the test"))
        self.said: list[str] = []
        self.watcher = Watcher(
            self.config, pruner or InThisProcess(run), api or new_api(), self.said.append, stop_asked, clock
        )

    @property
    def releases(self) -> list[Release]:
        return self.watcher.state.releases()

    def once(self) -> list[Release]:
        """Look and work once; return all releases."""
        self.watcher.once()
        return self.releases

    def statuses(self) -> dict[str, str]:
        """Return each release's status by the model's name."""
        return {release.found.name: release.status for release in self.releases}


def dies_with_its_watcher(watcher: BaseProcess, started: Path) -> bool:
    """Kill a watcher once what it has begun has left its process number in a file; whether that ends too."""
    watcher.start()
    while not (started.exists() and started.read_text()):
        assert watcher.is_alive()
        time.sleep(0.05)
    watcher.kill()
    watcher.join()
    with suppress(psutil.NoSuchProcess):  # it is gone already
        return psutil.wait_procs([psutil.Process(int(started.read_text()))], timeout=60)[1] == []
    return True


def copied(model: Path, target: Path) -> Path:
    """Copy a model directory, to be changed."""
    return Path(shutil.copytree(model, target))


def changed(model: Path, target: Path, seed: int) -> Path:
    """Copy a model directory with other weights."""
    copy = copied(model, target)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(shard).items()
    }
    save_file(tensors, shard, {"format": "pt"})
    return copy


def cut_short(model: Path, target: Path) -> Path:
    """Copy a model directory whose second shard ends too early."""
    copy = copied(model, target)
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return copy


def poisoned(model: Path, target: Path) -> Path:
    """Copy a model directory with a NaN in its weights."""
    copy = copied(model, target)
    shard = sorted(copy.glob("*.safetensors"))[2]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    return copy
