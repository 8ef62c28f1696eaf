"""From committed block shards to a model directory: one more shard, the small files, and last of all the index.

The block shards already are the output's shards. Until the index is written the directory cannot be loaded, so a
crash never leaves something that looks whole.
"""

import json
from functools import partial
from math import prod
from pathlib import Path

from pydantic import JsonValue

from pipeline.checkpoint import CONFIG_NAME, write_index
from pipeline.durable import write_atomically
from pipeline.ledger import Ledger
from pipeline.shard_names import outside_shard
from pipeline.shards import OutputTensor, read_header, write_shard
from pipeline.skeleton import Skeleton

PROVENANCE = "pruning.json"
OUTSIDE = "outside"
"""Name of the ledger's note about the shard of everything outside the blocks."""


def assemble(skeleton: Skeleton, ledger: Ledger, directory: Path, provenance: dict[str, JsonValue]) -> None:
    """Make `directory`, which holds every block's shard, a complete model directory."""
    if OUTSIDE not in ledger.notes:
        ledger.record(OUTSIDE, write_outside(skeleton, directory))
    for path in skeleton.checkpoint.side_files():
        target = directory / path.relative_to(skeleton.checkpoint.directory)
        target.parent.mkdir(exist_ok=True)
        is_config = path.name == CONFIG_NAME
        write_atomically(target, skeleton.checkpoint.config_bytes() if is_config else path.read_bytes())
    files = [outside_shard(skeleton.num_blocks), *(ledger.commits[i].file for i in sorted(ledger.commits))]
    entries = {file: read_header(directory / file) for file in files}
    weight_map = {name: file for file, header in entries.items() for name in header}
    tensors = [entry for header in entries.values() for entry in header.values()]
    total = sum(entry.num_bytes for entry in tensors)
    provenance = {**provenance, "parameters": sum(prod(entry.shape) for entry in tensors), "bytes": total}
    write_atomically(directory / PROVENANCE, json.dumps(provenance, indent=2, sort_keys=True).encode() + b"\n")
    write_index(directory, weight_map, total)


def write_outside(skeleton: Skeleton, directory: Path) -> dict[str, JsonValue]:
    """Copy every tensor that belongs to no block byte for byte into the first shard; return its receipt."""
    checkpoint = skeleton.checkpoint
    outputs = []
    for name in skeleton.outside_names():
        entry = checkpoint.tensors[name]
        chunks = partial(checkpoint.chunks, name)
        outputs.append(OutputTensor(name=name, dtype=entry.dtype, shape=entry.shape, chunks=chunks))
    shard = write_shard(directory / outside_shard(skeleton.num_blocks), outputs)
    return {"file": shard.file, "sha256": shard.sha256, "num_bytes": shard.num_bytes}
