"""A pruned block is written with the bits its source has, whichever way its weights are come by."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.block_writer import round_block, write_block
from pipeline.checkpoint import Checkpoint
from pipeline.linears import Linear, find_linears
from pipeline.methods.step import PrunedBlock, PrunedLinear
from pipeline.skeleton import Skeleton
from pipeline.sparsity import Unstructured
from tests.tiny import save_tiny

CPU = torch.device("cpu")
HALF = Unstructured(ratio=0.5)
EXACT = [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float16, torch.float16), (torch.float32, torch.float32),
]  # fmt: skip
ROUNDED = [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


def awkward(weight: torch.Tensor) -> torch.Tensor:
    """Put -0.0, the smallest denormals of both signs and the largest number among the weights."""
    weight, smallest = weight.clone(), torch.finfo(weight.dtype).smallest_normal
    denormal = torch.tensor(smallest, dtype=weight.dtype) * torch.finfo(weight.dtype).eps
    assert denormal > 0
    weight.view(-1)[:4] = torch.stack([-0.0 * denormal, denormal, -denormal, 3 * denormal])
    return weight


def source(family: str, stored: torch.dtype, directory: Path) -> Path:
    save_tiny(family, directory, dtype=stored, shard="1GB")
    path = directory / "model.safetensors"
    tensors = {n: awkward(t) if t.ndim == 2 else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def opened(directory: Path, compute: torch.dtype) -> tuple[Skeleton, list[Linear], PrunedBlock]:
    """The first block, loaded, and masks that keep half of its weights."""
    checkpoint = Checkpoint.open(directory)
    skeleton = Skeleton(checkpoint, CPU, compute)
    block = skeleton.load_block(0, checkpoint)
    linears = find_linears(block)
    generator = torch.Generator().manual_seed(0)
    masks = {n.name: torch.rand(n.weight(block).shape, generator=generator) < 0.5 for n in linears}
    for mask in masks.values():
        mask[:, 0] = True
    pruned = {name: PrunedLinear(keep_OD=mask, sparsity=HALF) for name, mask in masks.items()}
    return skeleton, linears, PrunedBlock(linears=pruned)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize(("stored", "compute"), [*EXACT, *ROUNDED])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_weights_keep_the_bits_they_are_stored_in(
    family: str, stored: torch.dtype, compute: torch.dtype, tmp_path: Path
) -> None:
    skeleton, linears, pruned = opened(source(family, stored, tmp_path / "model"), compute)
    original = load_file(tmp_path / "model/model.safetensors")
    records, _ = write_block(skeleton, 0, linears, pruned, tmp_path / "block.safetensors")
    written, names = load_file(tmp_path / "block.safetensors"), skeleton.block_names(0)
    for linear in linears:
        name, keep = names[linear.parameter], linear.to_stored(pruned.linears[linear.name].keep_OD)
        assert written[name].dtype == stored
        assert torch.equal(bits(written[name]), torch.where(keep, bits(original[name]), 0))
        assert torch.equal(skeleton.blocks[0].get_parameter(linear.parameter).data, written[name].to(compute))
        assert records[linear.name].pruned == int((~keep).sum())
        assert records[linear.name].zeros == int((written[name] == 0).sum())
    assert any((bits(t) != 0).logical_and(t == 0).any() for t in written.values()), "no -0.0 was kept"


@pytest.mark.parametrize(("stored", "compute"), EXACT)
def test_where_the_block_holds_every_bit_the_source_is_not_read_again(
    stored: torch.dtype, compute: torch.dtype, tmp_path: Path
) -> None:
    skeleton, linears, pruned = opened(source("llama", stored, tmp_path / "model"), compute)
    skeleton.checkpoint.close()
    shutil.rmtree(tmp_path / "model")
    round_block(skeleton, 0, linears, pruned)
    for linear in linears:
        assert not linear.weight(skeleton.blocks[0])[~pruned.linears[linear.name].keep_OD].any()


@pytest.mark.parametrize(("stored", "compute"), ROUNDED)
def test_what_is_put_into_a_block_elsewhere_is_what_was_written(
    stored: torch.dtype, compute: torch.dtype, tmp_path: Path
) -> None:
    directory = source("llama", stored, tmp_path / "model")
    skeleton, linears, pruned = opened(directory, compute)
    write_block(skeleton, 0, linears, pruned, tmp_path / "block.safetensors")
    other, _, _ = opened(directory, compute)
    round_block(other, 0, linears, pruned)
    for linear in linears:
        assert torch.equal(linear.weight(skeleton.blocks[0]), linear.weight(other.blocks[0]))


def test_tuned_norms_are_written_in_their_dtype_and_put_into_the_block_on_every_replica(tmp_path: Path) -> None:
    directory = source("llama", torch.bfloat16, tmp_path / "model")
    skeleton, linears, masked = opened(directory, torch.float32)
    name = "input_layernorm.weight"
    value = torch.linspace(0.9, 1.1, skeleton.blocks[0].get_parameter(name).numel())
    pruned = PrunedBlock(linears=masked.linears, others={name: value})
    write_block(skeleton, 0, linears, pruned, tmp_path / "block.safetensors")
    other, _, _ = opened(directory, torch.float32)
    round_block(other, 0, linears, pruned)
    written = load_file(tmp_path / "block.safetensors")[skeleton.block_names(0)[name]]
    assert torch.equal(written, value.bfloat16())
    for block in (skeleton.blocks[0], other.blocks[0]):
        assert torch.equal(block.get_parameter(name).data, value.bfloat16().float())
