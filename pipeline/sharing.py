"""How the replicas of a stage share the solving of linear steps: by rows where rows are alone, else by input.

Every replica ends with the same bits, for what one has solved is sent to all others as it is.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from pipeline.methods.step import LinearView, PrunedLinear, Solver
from pipeline.peers import Peers
from pipeline.sparsity import parse_sparsity


def share_out(costs: Sequence[float], num_owners: int) -> list[int]:
    """Return who gets each of the pieces: the costliest first, always to whoever has least."""
    loads, owners = [0.0] * num_owners, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += costs[piece]
    return owners


def solve_rows(solve: Solver, view: LinearView, peers: Peers) -> PrunedLinear:
    """Prune one linear whose rows are alone: each replica does a slab of them, and gets the others'."""
    if peers.size == 1:
        return solve(view)
    dense_OD = view.dense_OD
    bounds = [len(dense_OD) * rank // peers.size for rank in range(peers.size + 1)]
    slabs = [slice(start, stop) for start, stop in pairwise(bounds)]
    chosen_OD = torch.empty(dense_OD.shape, dtype=torch.bool, device=dense_OD.device)
    own = slabs[peers.rank]
    result = PrunedLinear(keep_OD=chosen_OD)
    if own.stop > own.start:
        result = solve(view.rows(own))
        assert result.weight_OD is None, "only masks are shared by rows"
        chosen_OD[own] = result.keep_OD
    for owner, slab in enumerate(slabs):
        if slab.stop > slab.start:
            peers.broadcast(chosen_OD[slab], owner)
    return PrunedLinear(keep_OD=chosen_OD, notes=result.notes)


def spread(result: PrunedLinear | None, weight_OD: torch.Tensor, peers: Peers, owner: int) -> PrunedLinear:
    """Send what its owner has made of one linear, whose dense weights are given, to the replicas that have None."""
    if peers.size == 1:
        assert result is not None
        return result
    facts = None if result is None else _facts(result)
    known = _broadcast_facts(facts, owner, peers, weight_OD.device)
    if result is None:
        new_OD = torch.empty_like(weight_OD, memory_format=torch.contiguous_format) if known["rewritten"] else None
        chosen_OD = torch.empty(weight_OD.shape, dtype=torch.bool, device=weight_OD.device)
        own = None if known["sparsity"] is None else parse_sparsity(known["sparsity"])
        result = PrunedLinear(keep_OD=chosen_OD, weight_OD=new_OD, notes=known["notes"], sparsity=own)
    peers.broadcast(result.keep_OD, owner)
    if result.weight_OD is not None:
        peers.broadcast(result.weight_OD, owner)
    return result


def _facts(result: PrunedLinear) -> dict[str, Any]:
    """What of a result is not in its tensors."""
    own = None if result.sparsity is None else str(result.sparsity)
    return {"rewritten": result.weight_OD is not None, "notes": result.notes, "sparsity": own}


def _broadcast_facts(facts: dict[str, Any] | None, owner: int, peers: Peers, device: torch.device) -> dict[str, Any]:
    """Send plain data from its owner, who alone has it, to all."""
    content = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(content)], device=device)
    peers.broadcast(size, owner)
    if facts is None:
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
    peers.broadcast(content, owner)
    received: dict[str, Any] = json.loads(bytes(content.tolist()))
    return received
