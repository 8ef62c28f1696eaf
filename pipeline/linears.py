"""The prunable matrices of a block, which of them share an input, and the statistics of those inputs.

A linear is a matrix `weight_OD` however it is stored: `nn.Linear` keeps it as it is, `Conv1D` (gpt2) transposed.
Everything outside this file sees weight_OD.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import NumericsError
from pipeline.peers import Peers
from pipeline.sequence_norms import SequenceNorms
from pipeline.statistics import Gathered, Statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One prunable matrix of a block."""

    name: str
    """Name of its module within the block, such as `self_attn.q_proj`."""

    parameter: str
    """Name of its parameter within the block."""

    transposed: bool
    """Whether it is stored as [D, O]."""

    def to_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """See a stored matrix as [O, D]; no copy."""
        return stored.T if self.transposed else stored

    def to_stored(self, matrix_OD: torch.Tensor) -> torch.Tensor:
        """See a matrix [O, D] as it is stored; no copy."""
        return matrix_OD.T if self.transposed else matrix_OD

    def weight(self, block: nn.Module) -> torch.Tensor:
        """Return weight_OD, a view of the block's parameter."""
        return self.to_rows(block.get_parameter(self.parameter).data)


def find_linears(block: nn.Module, skip: Sequence[str] = ()) -> list[Linear]:
    """Return the linears of a block in module order, less those whose name matches a `skip` pattern."""
    return [
        Linear(name=name, parameter=f"{name}.weight", transposed=isinstance(module, Conv1D))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(fnmatch(name, pattern) for pattern in skip)
    ]


class _EverythingSeen(Exception):
    """Ends a forward whose output nobody needs."""


class Collector:
    """Gathers statistics of the inputs of linears while the block runs, once per distinct input.

    Linears that are handed the very same tensor one after the other (q, k, v; gate, up) share one set of
    statistics. Who shares is seen in the first batch and holds for the rest.
    """

    def __init__(self, linears: Sequence[Linear], kinds: Sequence[type[Statistic]]) -> None:
        self._linears = linears
        self._kinds = kinds
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, Gathered] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        self._abandon_after: str | None = None
        self._first: int | None = None

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._kinds)

    def gathered(self, name: str) -> Gathered:
        """Return what was gathered of a linear's inputs; all that share them have the same."""
        return self._statistics[self._leader[name]] if self._statistics else Gathered()

    def groups(self) -> list[list[Linear]]:
        """Return the linears grouped by the input they share, in the order they ran (where their inputs were seen)."""
        ran = {name: position for position, name in enumerate(self._leader)}
        grouped: dict[str, list[Linear]] = {}
        for linear in sorted(self._linears, key=lambda linear: ran.get(linear.name, len(ran))):
            grouped.setdefault(self._leader.get(linear.name, linear.name), []).append(linear)
        return list(grouped.values())

    @contextmanager
    def watching(self, block: nn.Module, to_the_end: bool, first: int | None = None) -> Iterator[None]:
        """Gather from the forward of the block inside the context; of the `first` so many sequences, if not of all.

        Unless it has to run `to_the_end`, the forward is abandoned, and the context left, as soon as every input
        has been seen: the last matrix (a quarter of a LLaMA block's arithmetic) need not be multiplied.
        """
        handles = [
            block.get_submodule(linear.name).register_forward_pre_hook(self._hook(linear.name))
            for linear in self._linears
            if self._kinds
        ]
        self._abandon_after = None if to_the_end or not self._statistics else list(self._statistics)[-1]
        self._first = first
        try:
            yield
        except _EverythingSeen:
            pass
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def sum_over(self, peers: Peers) -> None:
        """Make every statistic that of all replicas' tokens; `num_tokens` stays this replica's."""
        for statistics in self._statistics.values():
            peers.sum([tensor for statistic in statistics for tensor in statistic.sums()])

    def check_finite(self) -> None:
        """Raise NumericsError naming the linear whose inputs were not finite."""
        for name, statistics in self._statistics.items():
            if not all(statistic.is_finite() for statistic in statistics):
                raise NumericsError(
                    f"hidden states at the input of {name} hold NaN or Inf; nothing of it was "
                    "written. Compute in float32 (`compute.dtype: float32`), or check the source model"
                )

    def _hook(self, name: str) -> Any:
        def gather(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            if name not in self._leader:
                shared = self._last is not None and self._last[1] is x
                self._leader[name] = self._leader[self._last[0]] if shared and self._last else name
            self._last = (name, x)
            if self._leader[name] == name:
                self._update(name, x[: self._first])
            if self._abandon_after == name:
                raise _EverythingSeen

        return gather

    def _update(self, name: str, x_BTD: torch.Tensor) -> None:
        x_TD = x_BTD.flatten(0, -2)
        if name not in self._statistics:
            self._statistics[name] = Gathered(kind.empty(x_TD.shape[1], x_TD.device) for kind in self._kinds)
        for statistic in self._statistics[name]:
            for tokens_TD in x_BTD if isinstance(statistic, SequenceNorms) else (x_TD,):
                statistic.update(tokens_TD)
