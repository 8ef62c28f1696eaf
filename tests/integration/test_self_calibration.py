"""Runs calibrated on what their model writes: it writes once, and however the run is cut, the bytes are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import self_calibration
from pipeline.errors import ConfigChanged, RunStopped
from pipeline.ledger import TOKENS_NAME, Ledger
from pipeline.sampler import sample_sequences
from tests.integration.support import SEQUENCES, TOKENS, carry_out, committed, job, outcome, write_text
from tests.tiny import save_tiny

CALIBRATION = {"source": "self", "sequences": SEQUENCES, "tokens": TOKENS, "seed": 3}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_text(tmp_path)
    save_tiny("gemma2", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def writings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What models have written since the test began."""
    found: list[torch.Tensor] = []

    def sample(*arguments: Any) -> torch.Tensor:
        found.append(sample_sequences(*arguments))
        return found[-1]

    monkeypatch.setattr(self_calibration, "sample_sequences", sample)
    return found


def own(source: Path, name: str, **calibration: object) -> dict[str, Any]:
    return job(source, source.parent / name, calibration=CALIBRATION | calibration)


def stop_when(settings: dict[str, Any], stop: Callable[[], bool]) -> None:
    with pytest.raises(RunStopped):
        carry_out(settings, stop=stop)


def test_a_run_that_goes_on_reads_what_the_model_wrote(source: Path, writings: list[torch.Tensor]) -> None:
    carry_out(own(source, "one"))
    assert len(writings) == 1
    assert torch.equal(load_file(source.parent / "one" / TOKENS_NAME)["tokens"], writings[0])
    settings, directory = own(source, "many"), source.parent / "many"
    stop_when(settings, lambda: (directory / TOKENS_NAME).exists())  # while it evaluates: no block is committed
    for num_blocks in (1, 2):
        stop_when(settings, committed(directory, num_blocks))
    carry_out(settings)
    assert outcome(directory) == outcome(source.parent / "one")
    assert len(writings) == 2


def test_a_run_killed_before_there_is_a_ledger_goes_on(source: Path, writings: list[torch.Tensor]) -> None:
    carry_out(own(source, "one"))
    early = source.parent / "early"
    early.mkdir()
    (early / TOKENS_NAME).write_bytes((source.parent / "one" / TOKENS_NAME).read_bytes())
    (early / f".{TOKENS_NAME}.0123abcd.tmp").write_bytes(b"half")
    carry_out(own(source, "early"))
    assert outcome(early) == outcome(source.parent / "one")
    assert len(writings) == 1
    assert list(early.glob(".*.tmp")) == []


def test_a_stop_while_the_model_writes_leaves_a_directory_to_begin_in(
    source: Path, writings: list[torch.Tensor]
) -> None:
    stop_when(own(source, "run"), lambda: True)
    assert writings == []
    carry_out(own(source, "run"))
    assert len(writings) == 1


def test_another_seed_is_another_run(source: Path) -> None:
    carry_out(own(source, "one"))
    with pytest.raises(ConfigChanged, match="seed 3, now 4"):
        carry_out(own(source, "one", seed=4))
    carry_out(own(source, "other", seed=4))
    hashes = {Ledger.read(source.parent / name).header.calibration for name in ("one", "other")}
    assert len(hashes) == 2
