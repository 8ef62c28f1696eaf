"""Which splits between blocks and neurons are tried, and by what runs."""

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pipeline.checkpoint import Checkpoint
from pipeline.config import RunConfig, parse_config
from pipeline.errors import ConfigError
from pipeline.methods.structured.narrowing import Comp
from pipeline.methods.structured.shape_step import ShortGpt
from pipeline.skeleton import Skeleton
from pipeline.splits import Trials, splits_of
from tests.tiny import FAMILIES, GROUPED, save_tiny

NUM_BLOCKS = 12


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    directory = tmp_path_factory.mktemp("splits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "twelve", LlamaConfig(**{**GROUPED, "num_hidden_layers": NUM_BLOCKS}))
        save_tiny("twelve", directory)
    with closing(Checkpoint.open(directory)) as checkpoint:
        yield Skeleton(checkpoint, torch.device("cpu"), torch.float32)


def config_of(dense: Skeleton, sparsity: float, recipe: list[Any], **sections: Any) -> RunConfig:
    raw = {"model": str(dense.checkpoint.directory), "output": "run", "prune": {"recipe": recipe, "sparsity": sparsity}}
    return parse_config(raw | sections, "the test")


def test_splits_that_leave_too_few_neurons_are_left_out(dense: Skeleton) -> None:
    step = Comp(depth_fraction="auto")
    assert splits_of(step, dense, Fraction(3, 10)) == [0, 1, 2, 3]
    # Neurons hold 4608 of a block's 7744 parameters: without n blocks (9 - n) 7744 / ((12 - n) 4608) of them would go.
    assert splits_of(step, dense, Fraction(3, 4)) == [6, 7, 8, 9]
    with pytest.raises(ConfigError, match=r"above the most a block may lose, 90%"):
        splits_of(Comp(depth_fraction=0.0), dense, Fraction(3, 4))
    with pytest.raises(ConfigError, match=r"with 10 of 12 blocks gone .* above the most a block may lose"):
        splits_of(Comp(depth_fraction="auto"), dense, Fraction(99, 100))


@given(sparsity=st.floats(0.01, 0.6))
def test_every_trial_is_of_the_number_of_blocks_it_is_for(sparsity: float, dense: Skeleton) -> None:
    config = config_of(dense, sparsity, [{"comp": {"depth_fraction": "auto"}}])
    trials = Trials.of(config, dense)
    splits = splits_of(Comp(depth_fraction="auto"), dense, config.prune.target.fraction)
    assert (trials is None) == (len(splits) == 1)
    for num_dropped in splits if trials is not None else []:
        assert trials is not None
        prune = trials.run_of(num_dropped, Path("somewhere")).prune
        step, ratio = prune.steps.shape, prune.steps.part_removed(prune.target)
        assert step is not None
        assert splits_of(step, dense, ratio) == [num_dropped]


def test_a_trial_is_the_shape_step_alone_with_all_its_options_on_fewer_sequences(dense: Skeleton) -> None:
    recipe = [{"comp": {"ratio": 0.3, "depth_fraction": "auto", "rounds": 3, "held_out": 0.25}}, "wanda"]
    config = config_of(
        dense, 0.5, recipe, calibration={"sequences": 10, "tokens": 7}, memory={"host": "1GiB", "spool": "/fast"},
        compute={"threads": 1, "batch": 2},
    )  # fmt: skip
    trials = Trials.of(config, dense)
    assert trials is not None
    trial = trials.run_of(2, Path("somewhere"))
    assert (trial.calibration.sequences, trial.calibration.tokens, trials.num_held_out) == (8, 7, 2)
    assert (trial.evaluate.windows, trial.evaluate.sequence_length) == (2, 7) if trial.evaluate else False
    assert (trial.compute.threads, trial.compute.batch, trial.compute.device) == (1, 2, "cpu")
    assert trial.compute.dtype == "float32"
    assert (trial.memory.host, trial.memory.spool) == (2**30, None)
    step = trial.prune.steps.shape
    assert isinstance(step, Comp)
    assert (trial.prune.steps.steps, trial.prune.target.fraction, step.rounds) == ((), Fraction(3, 10), 3)


def test_a_split_that_is_named_or_the_only_one_needs_no_trial(dense: Skeleton) -> None:
    assert Trials.of(config_of(dense, 0.3, [{"comp": {"depth_fraction": 0.5}}]), dense) is None
    assert Trials.of(config_of(dense, 0.05, [{"comp": {"depth_fraction": "auto"}}]), dense) is None
    assert Trials.of(config_of(dense, 0.3, ["shortgpt"]), dense) is None
    assert splits_of(ShortGpt(), dense, Fraction(1, 4)) == [3]
