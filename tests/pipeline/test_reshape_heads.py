"""A block built with fewer heads by its own class does what the dense one does with their columns of o at zero."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.anatomy import Cut, mlp_of
from pipeline.attention import HeadCut, HeadUnit, attention_of
from pipeline.checkpoint import Checkpoint
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream
from tests.heads import FITTING, families_with_heads
from tests.tiny import save_tiny, some_tokens

CASES = [
    (family, unit)
    for family in (*FITTING, "h-llama-wide")
    for unit in ("group", "query")
    if (family, unit) != ("h-llama-whole", "query")  # its groups have one query head each, which stays
]


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Iterator[None]:
    with families_with_heads():
        yield


@torch.no_grad()
@pytest.mark.parametrize(("family", "unit"), CASES)
def test_a_block_with_fewer_heads_equals_the_dense_one_without_them(
    family: str, unit: HeadUnit, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
        stream, attention = Stream(skeleton, checkpoint), attention_of(skeleton.model.config)
        layout, mlp = attention.layout, mlp_of(skeleton.model.config)
        keep_PV = torch.ones(layout.num_pools(unit), layout.per_pool(unit), dtype=torch.bool)
        keep_PV[torch.arange(len(keep_PV)), torch.arange(len(keep_PV)) % layout.per_pool(unit)] = False
        kept, keep_U = layout.kept(keep_PV.flatten(), unit), torch.arange(48) % 5 != 2
        cut = Cut(mlp=mlp, keep_U=keep_U, heads=HeadCut(attention=attention, kept=kept))
        with stream.outside_weights():
            hidden_BTD = stream.embed(some_tokens(2, 20))
        block = skeleton.load_block(1, checkpoint)
        before = stream.run_block(1, hidden_BTD)
        block.get_parameter(f"{attention.reader}.weight").data[:, ~kept.query_features] = 0
        without_heads = stream.run_block(1, hidden_BTD)
        block.get_parameter(f"{mlp.reader}.weight").data[:, ~keep_U] = 0
        zeroed = stream.run_block(1, hidden_BTD)
        dense = skeleton.reshape_block(1, int(keep_U.sum()), kept.remaining)
        for own in skeleton.block_names(1):
            skeleton.put(1, own, cut.left(own, dense.state_dict()[own]))
            assert skeleton.shape_of(1, own) == tuple(skeleton.blocks[1].state_dict()[own].shape)
        assert (stream.run_block(1, hidden_BTD) - zeroed).abs().max() <= 1e-5 * zeroed.abs().max()
        assert (without_heads - before).abs().max() > 1e-3 * before.abs().max(), "these heads make no difference"
        skeleton.reshape_block(1, 8, kept.remaining)  # once more; what is released is dense again all the same
        skeleton.release_block(1)
        skeleton.load_block(1, checkpoint)
        assert torch.equal(stream.run_block(1, hidden_BTD), before)
