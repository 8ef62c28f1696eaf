"""What `verify` reads is what loaders read, and all that was to be pruned is pruned, whatever else lies there."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import VerificationError
from pipeline.ledger import Ledger
from pipeline.verify import verify
from tests.integration.narrow import NARROW, exchange, settings
from tests.integration.narrow import three_blocks as three_blocks
from tests.integration.support import INDEX, SILENT, carry_out, tensors_in

DOWN = "model.layers.0.mlp.down_proj.weight"


def in_another_shard(model: Path) -> None:
    """Have the index name a copy of the first block's shard, with other weights; the shard itself stays."""
    index = json.loads((model / INDEX).read_text())
    file = index["weight_map"][DOWN]
    shutil.copy(model / file, model / "other.safetensors")
    index["weight_map"] = {n: "other.safetensors" if f == file else f for n, f in index["weight_map"].items()}
    (model / INDEX).write_text(json.dumps(index))
    exchange(model, DOWN, torch.rand_like)


def in_one_file(model: Path) -> None:
    """Put all tensors, one of them changed, into the file that loaders look for first."""
    tensors = tensors_in(model)
    save_file({**tensors, DOWN: torch.rand_like(tensors[DOWN])}, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "name"), [(in_another_shard, "other.safetensors"), (in_one_file, "model.safetensors")]
)
def test_a_model_read_from_files_that_no_block_was_written_to_does_not_verify(
    change: Callable[[Path], None], name: str, source: Path, tmp_path: Path
) -> None:
    carry_out(settings(source, tmp_path, [{"comp": {**NARROW[0]["comp"], "recovery": "lstsq"}}], 0.35))  # type: ignore[index,call-overload]
    assert Ledger.read(tmp_path).commits[0].cut.rewritten  # type: ignore[union-attr]
    change(tmp_path / "model")
    with pytest.raises(
        VerificationError, match=rf"{name} is what the model is read from, and the ledger knows no such"
    ):
        verify(tmp_path, source, SILENT)


def test_a_block_of_which_nothing_was_pruned_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path / "run", ["wanda"], 0.5))
    ledger, dense = Ledger.read(tmp_path / "run"), tensors_in(source)
    again = Ledger.open(tmp_path / "again", ledger.header)
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "again" / "model")
    for name, value in ledger.notes.items():
        again.record(name, value)
    for block, commit in ledger.commits.items():
        if block == 1:
            path = tmp_path / "again" / "model" / commit.file
            save_file({name: dense[name] for name in load_file(path)}, path, {"format": "pt"})
            commit = replace(commit, linears={}, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        again.commit(commit)
    with pytest.raises(VerificationError, match=r"block 1: mlp\.down_proj, .* not pruned though asked for"):
        verify(tmp_path / "again", source, SILENT)


def test_a_masked_model_of_another_config_does_not_verify(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path, ["wanda"], 0.5))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(VerificationError, match=r"config\.json is not the source's"):
        verify(tmp_path, source, SILENT)
