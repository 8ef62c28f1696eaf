"""The streamed forward equals the model's own, for every family."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedCheckpoint
from pipeline.skeleton import Skeleton
from pipeline.stream import Stream, _same
from tests.tiny import FAMILIES, WINDOW, save_mixtral, save_tiny, some_tokens

CPU = torch.device("cpu")


def streamed_logits(directory: Path, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, Skeleton]:
    checkpoint = Checkpoint.open(directory)
    skeleton = Skeleton(checkpoint, CPU, torch.float32)
    stream = Stream(skeleton, checkpoint)
    with torch.no_grad(), stream.outside_weights():
        hidden = stream.embed(tokens_BT)
    for index in range(skeleton.num_blocks):
        skeleton.load_block(index, checkpoint)
        with torch.no_grad():
            hidden = stream.run_block(index, hidden)
        skeleton.release_block(index)
    with stream.outside_weights():
        logits = stream.logits(hidden)
    checkpoint.close()
    return logits, skeleton


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_sequences", [1, 4])
def test_streamed_forward_equals_the_models_own(family: str, num_sequences: int, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    tokens = some_tokens(num_sequences, 3 * WINDOW)
    with torch.no_grad():
        expected = model(tokens).logits
    found, _ = streamed_logits(tmp_path, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_stays_in_memory_after_a_forward(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    _, skeleton = streamed_logits(tmp_path, some_tokens(2, 5))
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}


def test_logits_of_token_slices_equal_logits_of_the_whole(tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    stream = Stream(Skeleton(checkpoint, CPU, torch.float32), checkpoint)
    hidden = torch.randn(1, 12, 32)
    with stream.outside_weights():
        whole = stream.logits(hidden)
        parts = torch.cat([stream.logits(hidden[:, :5]), stream.logits(hidden[:, 5:])], dim=1)
    torch.testing.assert_close(parts, whole)
    checkpoint.close()


def test_replaying_the_first_blocks_arguments_would_be_wrong_for_gemma3(tmp_path: Path) -> None:
    """Guards the reason for recording arguments per block: gemma3's blocks are given different masks and tables."""
    save_tiny("gemma3", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    stream = Stream(Skeleton(checkpoint, CPU, torch.float32), checkpoint)
    sliding, full, _ = stream._arguments_for(1, 3 * WINDOW)
    assert not _same(sliding.named["attention_mask"], full.named["attention_mask"])
    assert not _same(sliding.named["position_embeddings"], full.named["position_embeddings"])
    checkpoint.close()


def test_blocks_given_arguments_that_depend_on_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    skeleton = Skeleton(checkpoint, CPU, torch.float32)
    stream = Stream(skeleton, checkpoint)
    rotary = skeleton.model.model.rotary_emb
    original = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: [t + x.sum() for t in original(x, position_ids)])
    with stream.outside_weights(), pytest.raises(UnsupportedCheckpoint, match="arguments that depend on the tokens"):
        stream.embed(some_tokens(1, 6))
    checkpoint.close()


def test_mixture_of_experts_is_refused_clearly(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"3 dimensions .* not fused experts"):
        Skeleton(checkpoint, CPU, torch.float32)
    checkpoint.close()
