"""Names of the output's shards: one for everything outside the blocks, then one per block."""


def outside_shard(num_blocks: int) -> str:
    """Return the file of the tensors that belong to no block."""
    return f"model-00001-of-{num_blocks + 1:05d}.safetensors"


def block_shard(index: int, num_blocks: int) -> str:
    """Return the file of one block's tensors."""
    return f"model-{index + 2:05d}-of-{num_blocks + 1:05d}.safetensors"
