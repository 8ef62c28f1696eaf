"""The dense pass before pruning: observers see what the whole model does, and outliers are counted by the book."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import sparsity
from pipeline.allocation import Outliers
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError, NumericsError, RunStopped
from pipeline.memory import Memory, unlimited
from pipeline.outliers import OutlierCounter, count_outliers
from pipeline.progress import Silent
from pipeline.skeleton import Skeleton
from pipeline.statistics import Statistic
from pipeline.survey import Observer, SurveyedBlock, survey
from tests.stores import disk
from tests.tiny import save_tiny, some_tokens

CPU = torch.device("cpu")
TOKENS_NT = some_tokens(5, 12)
THRESHOLD = 2.5


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("survey") / "model"
    save_tiny(request.param, path)
    return path


@pytest.fixture
def skeleton(directory: Path) -> Iterator[Skeleton]:
    with closing(Checkpoint.open(directory)) as checkpoint:
        yield Skeleton(checkpoint, CPU, torch.float32)


class Witness:
    """Keeps all it sees."""

    statistics: tuple[type[Statistic], ...] = ()

    def __init__(self) -> None:
        self.entering: dict[int, list[torch.Tensor]] = {}
        self.leaving: dict[int, list[torch.Tensor]] = {}
        self.judged: dict[int, list[str]] = {}

    def see(self, index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
        self.entering.setdefault(index, []).append(entering_BTD.clone())
        self.leaving.setdefault(index, []).append(leaving_BTD.clone())

    def judge(self, block: SurveyedBlock) -> None:
        self.judged[block.index] = list(block.weights)


def go(
    skeleton: Skeleton,
    *observers: Observer,
    memory: Memory | None = None,
    skip: tuple[str, ...] = (),
    stop_at: int = 99,
) -> None:
    """Survey a model, and stop after some blocks if asked to."""
    passed: list[int] = []

    def between() -> None:
        passed.append(len(passed))
        if len(passed) == stop_at:
            raise RunStopped(f"stopped after {stop_at}")

    survey(
        skeleton, TOKENS_NT, observers, skip=skip, batch=2, memory=memory or unlimited(), progress=Silent(),
        between_blocks=between,
    )  # fmt: skip


def counted(directory: Path) -> list[Outliers]:
    """Outliers of each block by the model's own forward, all scores of a block beside each other, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    inputs: dict[str, torch.Tensor] = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].flatten(0, -2)}))
    with torch.no_grad():
        model(TOKENS_NT)
    scores: dict[str, list[torch.Tensor]] = {}
    for name, module in linears.items():
        weight_OD = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        score = weight_OD.detach().abs() * inputs[name].norm(dim=0)
        scores.setdefault(next(part for part in name.split(".") if part.isdigit()), []).append(score.flatten())
    found = []
    for parts in scores.values():
        score = torch.cat(parts)
        num_outliers = int((score > THRESHOLD * score.mean()).sum())
        found.append(Outliers(num_outliers=num_outliers, num_weights=score.numel()))
    return found


def test_outliers_are_counted_as_the_whole_model_has_them(directory: Path, skeleton: Skeleton) -> None:
    counter = OutlierCounter(THRESHOLD)
    go(skeleton, counter)
    assert counter.found == counted(directory)
    assert len({block.num_outliers for block in counter.found}) > 1, "the blocks differ"


def test_observers_see_what_enters_and_leaves_each_block(directory: Path, skeleton: Skeleton) -> None:
    witness = Witness()
    go(skeleton, witness, OutlierCounter(THRESHOLD))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        states = model(TOKENS_NT, output_hidden_states=True).hidden_states
    for index in range(skeleton.num_blocks):
        torch.testing.assert_close(torch.cat(witness.entering[index]), states[index])
        if index > 0:
            assert torch.equal(torch.cat(witness.entering[index]), torch.cat(witness.leaving[index - 1]))
    assert [len(names) > 3 for names in witness.judged.values()] == [True] * skeleton.num_blocks


def test_hidden_states_on_disk_and_no_reading_ahead_change_nothing(skeleton: Skeleton, tmp_path: Path) -> None:
    here, there = OutlierCounter(THRESHOLD), OutlierCounter(THRESHOLD)
    go(skeleton, here)
    with disk(tmp_path, "threads") as spool:
        go(skeleton, there, memory=Memory(budget=spool.budget, store=spool.store(2), pager=spool.pager, ahead=0))
    assert spool.files() == []
    assert here.found == there.found


def test_skipped_linears_are_not_looked_at(skeleton: Skeleton) -> None:
    everything, some = Witness(), Witness()
    go(skeleton, everything)
    skipped = everything.judged[0][-1]
    go(skeleton, some, skip=(skipped,))
    assert some.judged[0] == everything.judged[0][:-1]
    with pytest.raises(ConfigError, match=r"prune\.skip: 'no such' matches no linear"):
        go(skeleton, some, skip=("no such",))


def test_a_survey_can_be_ended_between_blocks(skeleton: Skeleton) -> None:
    witness = Witness()
    with pytest.raises(RunStopped, match="stopped after 1"):
        go(skeleton, witness, stop_at=1)
    assert list(witness.judged) == [0]


def test_hidden_states_that_are_not_finite_end_a_survey(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "sound")
    for linear in (model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj):
        linear.weight.data *= 1e30
    model.save_pretrained(tmp_path / "model")
    with (
        closing(Checkpoint.open(tmp_path / "model")) as checkpoint,
        pytest.raises(NumericsError, match="after dense block 1 hold NaN or Inf"),
    ):
        go(Skeleton(checkpoint, CPU, torch.float32), OutlierCounter(THRESHOLD))


def test_outliers_are_counted_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    linears = [
        (torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) * 3)
        for shape in ((7, 5), (4, 9), (6, 3))
    ]
    score = torch.cat([(weight.double().abs() * norm.double()).flatten() for weight, norm in linears])
    expected = Outliers(num_outliers=int((score > 2 * score.mean()).sum()), num_weights=89)
    assert 0 < expected.num_outliers < 89
    for slab in (1 << 23, 10):
        monkeypatch.setattr(sparsity, "SLAB_NUMEL", slab)
        assert count_outliers(linears, 2.0) == expected


def test_weights_that_are_all_zero_have_no_outliers() -> None:
    found = count_outliers([(torch.zeros(4, 4), torch.ones(4))], 5.0)
    assert found == Outliers(num_outliers=0, num_weights=16)
