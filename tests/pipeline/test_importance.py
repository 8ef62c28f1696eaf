"""The importance of blocks, met on a survey of a whole small model, against the model's own hidden states."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from pipeline.checkpoint import Checkpoint
from pipeline.importance import ImportanceMeter
from pipeline.memory import unlimited
from pipeline.progress import Silent
from pipeline.skeleton import Skeleton
from pipeline.survey import survey
from tests.tiny import save_tiny, some_tokens

TOKENS_NT = some_tokens(5, 12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("importance") / "model"
    save_tiny("llama", path)
    return path


def surveyed(directory: Path, meter: ImportanceMeter, batch: int) -> list[float]:
    with closing(Checkpoint.open(directory)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        survey(
            skeleton, TOKENS_NT, [meter], skip=(), batch=batch, memory=unlimited(), progress=Silent(),
            between_blocks=lambda: None,
        )  # fmt: skip
    return meter.found


@pytest.mark.parametrize("num_skipped", [0, 1])
@pytest.mark.parametrize("batch", [2, 5])
def test_importance_is_how_far_the_models_own_hidden_states_turn(directory: Path, batch: int, num_skipped: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        entered.append(inputs[0])
        left.append(output)

    for block in model.model.layers:
        block.register_forward_hook(note)
    with torch.no_grad():
        model(TOKENS_NT)
    expected = [
        (1 - cosine_similarity(x.double(), y.double(), dim=-1))[:, num_skipped:].mean().item()
        for x, y in zip(entered, left, strict=True)
    ]
    assert surveyed(directory, ImportanceMeter(num_skipped), batch) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 3
