"""A block built narrower by its own class does what the dense one does with the same neurons at zero."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.anatomy import MLPS, mlp_of
from pipeline.checkpoint import Checkpoint
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
from tests.tiny import FAMILIES, save_tiny, some_tokens

KNOWN = [family for family, config in FAMILIES.items() if config.model_type in MLPS]
GONE = [3, 7, 8, 20, 21, 22, 40, 41]


def keep() -> torch.Tensor:
    keep_U = torch.ones(48, dtype=torch.bool)
    keep_U[GONE] = False
    return keep_U


@torch.no_grad()
@pytest.mark.parametrize("family", KNOWN)
def test_a_narrow_block_equals_the_dense_one_without_these_neurons(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    keep_U = keep()
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        stream, mlp = Stream(skeleton, checkpoint), mlp_of(skeleton.model.config)
        with stream.outside_weights():
            hidden_BTD = stream.embed(some_tokens(2, 20))
        block = skeleton.load_block(1, checkpoint)
        reader = block.get_parameter(f"{mlp.reader}.weight")
        before = stream.run_block(1, hidden_BTD)
        reader.data[:, ~keep_U] = 0
        zeroed = stream.run_block(1, hidden_BTD)
        dense = skeleton.reshape_block(1, int(keep_U.sum()))
        for own in skeleton.block_names(1):
            skeleton.put(1, own, mlp.left(own, dense.state_dict()[own], keep_U))
            assert skeleton.shape_of(1, own) == tuple(skeleton.blocks[1].state_dict()[own].shape)
        narrow = stream.run_block(1, hidden_BTD)
        assert (narrow - zeroed).abs().max() <= 1e-5 * zeroed.abs().max()
        assert (zeroed - before).abs().max() > 1e-3 * before.abs().max(), "neurons that make no difference show nothing"
        skeleton.release_block(1)
        assert skeleton.shape_of(1, f"{mlp.reader}.weight") == (32, 48)
        skeleton.load_block(1, checkpoint)
        assert torch.equal(stream.run_block(1, hidden_BTD), before)
