"""Weights that exist only while they are used: made when their module runs, and once more for its backward pass.

Trying other weights on a block takes as much memory as the block where all of them are formed beforehand and kept for
the backward pass. Formed one module at a time, no more than one of them and its gradient are alive.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

Maker = Callable[[], torch.Tensor]
"""Makes a weight: the same bits in the same layout at every call, each time in memory of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """Where a tensor lay in the memory of a weight that has been dropped."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def made_on_demand(module: nn.Module, makers: Mapping[str, Maker]) -> Iterator[None]:
    """Inside the context, let makers take the place of parameters (by their name within the module).

    A maker is called when the submodule that owns the parameter runs its forward, and again when the backward pass
    comes back to it, which may be after the context. Gradients flow to whatever the maker made its weight from.
    """
    with ExitStack() as stack:
        patched: set[str] = set()
        for name, make in makers.items():
            path, _, leaf = name.rpartition(".")
            owner: Any = module.get_submodule(path)
            owner.forward = partial(_forward_with, owner, leaf, make, owner.forward)
            if path not in patched:  # a second parameter of a module is made around the first
                stack.callback(delattr, owner, "forward")
                patched.add(path)
        yield


def _forward_with(owner: nn.Module, leaf: str, make: Maker, forward: Callable[..., Any], *args: Any) -> Any:
    """Run a module's forward with a weight made for it; nothing of that weight stays behind."""
    own, made = owner._parameters[leaf], make()
    place = made.untyped_storage().data_ptr()

    def pack(saved: torch.Tensor) -> torch.Tensor | _View:
        if saved.untyped_storage().data_ptr() != place:
            return saved
        return _View(size=saved.size(), stride=saved.stride(), offset=int(saved.storage_offset()))

    @torch.no_grad()
    def unpack(packed: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        return make().as_strided(packed.size, packed.stride, packed.offset)

    owner._parameters[leaf] = made  # type: ignore[assignment]  # as functional_call does; any tensor serves the forward
    try:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args)
    finally:
        owner._parameters[leaf] = own
