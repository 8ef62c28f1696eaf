"""What the integration tests share: tiny jobs in a temporary directory, run in this process, and their bytes."""

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from cluster.cli import main
from pipeline.config import parse_config
from pipeline.ledger import Ledger
from pipeline.progress import Progress, Silent
from pipeline.report import Report
from pipeline.run import run
from tests.tiny import some_text

RecipeEntries = Sequence[str | dict[str, Any]]

SEQUENCES, TOKENS = 6, 24
"""Of the calibration. 24 tokens is longer than the sliding window of the families that have one."""

WINDOWS, LENGTH = 5, 20
"""Of the evaluation."""

INDEX = "model.safetensors.index.json"
SILENT = Silent()


def write_text(directory: Path) -> Path:
    """Write the text that calibrates and evaluates."""
    path = directory / "text.txt"
    path.write_text(some_text(2_000), encoding="utf-8")
    return path


def job(
    model: Path, output: Path, recipe: RecipeEntries = ("wanda",), sparsity: float | str = 0.5, **sections: Any
) -> dict[str, Any]:
    """A configuration as plain data, on the text that lies beside the model; `sections` replace or join it."""
    text = str(model.parent / "text.txt")
    return {
        "model": str(model),
        "output": str(output),
        "calibration": {"source": {"text": text}, "sequences": SEQUENCES, "tokens": TOKENS},
        "prune": {"recipe": list(recipe), "sparsity": sparsity},
        "evaluate": {"text": text, "sequence_length": LENGTH, "windows": WINDOWS},
    } | sections


def never() -> bool:
    """Ask for no stop."""
    return False


def carry_out(settings: dict[str, Any], progress: Progress = SILENT, stop: Callable[[], bool] = never) -> Report:
    """Run a job in this process, silently and to its end unless told otherwise."""
    return run(parse_config(settings, "the test"), progress, stop)


def outcome(run_directory: Path) -> dict[str, Any]:
    """What a run has made, without what may differ between two runs: times, places and who holds the lock."""
    commits = Ledger.read(run_directory).commits
    return {
        "files": digests(run_directory / "model"),
        "commits": {block: (commit.sha256, commit.error, commit.linears) for block, commit in commits.items()},
    }


def committed(run_directory: Path, num_blocks: int) -> Callable[[], bool]:
    """A question that turns true, and asks for a stop, once so many blocks are committed."""
    ledger = run_directory / "ledger.jsonl"  # which there is not yet while a shape is chosen
    return lambda: ledger.exists() and len(Ledger.read(run_directory).commits) >= num_blocks


def asked_otherwise(run_directory: Path, again: Path, change: Callable[[Any], None]) -> None:
    """Make a run directory of the same model and commits, whose ledger says that something else was asked for."""
    ledger = Ledger.read(run_directory)
    change(ledger.header.config["prune"])
    (run_directory / "ledger.jsonl").unlink()
    copy = Ledger.open(again, ledger.header)
    for commit in ledger.commits.values():
        copy.commit(commit)
    (again / "model").symlink_to(run_directory / "model")


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory, read by the format's own library."""
    files = sorted(directory.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and equal to the bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file under a directory, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def load(directory: Path) -> PreTrainedModel:
    """The model as its users load it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model.eval()


def loaded_whole(directory: Path) -> PreTrainedModel:
    """The model in float32, whose files lack no tensor of it, have no other, and none of another shape."""
    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole: PreTrainedModel = model.eval()
    return whole


def perplexity_of(model: PreTrainedModel, windows_WL: torch.Tensor) -> float:
    """exp(sum of cross-entropies / (windows x (length - 1))) by the model's own forward."""
    num_windows, length = windows_WL.shape
    with torch.no_grad():
        logits = model(windows_WL).logits[:, :-1].double()
    total = cross_entropy(logits.flatten(0, 1), windows_WL[:, 1:].flatten(), reduction="sum")
    return math.exp(total.item() / (num_windows * (length - 1)))


def evaluation_windows(model: Path) -> torch.Tensor:
    """The windows of the evaluation: the text beside the model, tokenised whole and cut from its start."""
    text = (model.parent / "text.txt").read_text(encoding="utf-8")
    ids: torch.Tensor = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")["input_ids"][0]
    return ids[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)


def matrices(model: PreTrainedModel) -> dict[str, bool]:
    """Parameter names of the matrices within the model's blocks -> whether they are stored [D, O]."""
    inside = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }
    assert inside
    return inside


def by_rows(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prunable matrices among `tensors`, each seen as [O, D]."""
    return {name: tensors[name].T if transposed else tensors[name] for name, transposed in matrices(model).items()}


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    """Hold that what happens inside changes no file of a directory, adds none and takes none away."""
    before = digests(directory)
    yield
    assert digests(directory) == before


def run_command(arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """Call the `secateur` command's entry point in this process; return its exit status."""
    monkeypatch.setattr("sys.argv", ["secateur", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    verbosity = logging.get_verbosity()
    try:
        with pytest.raises(SystemExit) as exit_:
            main()
    finally:
        logging.set_verbosity(verbosity)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def refusal(config: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a configuration that must be refused; hold that nothing is left half done, and return the error."""
    with untouched(source):
        status = run_command(["run", config], monkeypatch)
    said = capsys.readouterr()
    assert (status, said.out) == (1, "")
    assert not (Path(yaml.safe_load(config.read_text())["output"]) / "model" / INDEX).exists()
    progress, _, message = said.err.partition("error: ")
    assert "Traceback" not in progress
    assert message
    return message
