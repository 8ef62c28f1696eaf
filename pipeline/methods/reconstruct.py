"""Reconstruct: give the kept weights of a pruned block new values, so that it does again what the dense block did.

The mask stays; the kept weights of all linears of the block, and where asked its norms and biases, go down the
gradient of the block's reconstruction error together. Sources: Guo et al., "EBFT" (2402.12419), which tunes block by
block; Shin et al., "Rethinking Pruning Large Language Models" (2406.15524), which shows what it can cost: the error on
the calibration text falls faster than that on other text. So some sequences are held out, the error on them is
measured after every pass, and the weights that did best there are the ones that stay: those that came in, if need be.

With `gradual` it begins with the dense block, and weights go little by little while the others learn (`gradual.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import cos, inf, pi
from typing import ClassVar

import torch
from pydantic import Field

from pipeline.errors import NumericsError
from pipeline.lazy_weights import Maker
from pipeline.methods.gradual import GradualMask
from pipeline.methods.step import (
    BlockStep,
    BlockView,
    MiniBatch,
    PrunedBlock,
    PrunedLinear,
    Report,
    Shapes,
    largest,
    loss_scale,
    num_weights,
)
from pipeline.methods.wanda import input_norms
from pipeline.sparsity import SemiStructured, Sparsity, selection_bytes
from pipeline.statistics import ColumnSquares, Statistic, relative_error
from pipeline.stream_names import StreamName

LEARNING_BYTES = 16
"""Bytes a weight takes while it is learnt: its value in float32, its gradient, and Adam's two moments."""


class Reconstruct(BlockStep):
    """Tune the kept weights of a block against the dense block's outputs."""

    accepts_mask: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    target: StreamName = "dense"
    """Stream on which the dense block makes the outputs to reproduce. `dense` also undoes what the blocks before have
    done to the hidden states; `pruned` is one boundary less to hold, and a pass less over the model."""

    epochs: int = Field(default=4, ge=1)
    """Passes over the calibration sequences, at most."""

    batch: int = Field(default=1, ge=1)
    """Sequences per update, of each replica."""

    rate: float = Field(default=0.01, gt=0)
    """First step size of Adam, as a part of the root mean square of the weights that it tunes; it falls to 0 along a
    cosine."""

    norms: bool = False
    """Whether norms and biases are tuned as well."""

    gradual: bool = False
    """Whether the mask that comes in just says how many weights go of every row (or group): which, is chosen in stages
    over the first half of all updates. Pays where much goes: 2:4, and beyond 60%."""

    held_out: float = Field(default=0.125, ge=0, lt=1)
    """Part of the sequences that is not learnt from; 0: no check, and the last pass stays."""

    seed: int = 0
    """Of the order in which sequences are taken."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """None, for it sees the block's outputs themselves; to choose the mask, input norms."""
        return (ColumnSquares,) if self.gradual else ()

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """What learning takes, the best values so far, and one linear's weight as it runs with its gradient."""
        learnt = (LEARNING_BYTES + dtype.itemsize) * num_weights(shapes) + (2 * dtype.itemsize + 4) * largest(shapes)
        return learnt + (num_weights(shapes) + selection_bytes(largest(shapes)) if self.gradual else 0)

    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> PrunedBlock:
        """Return the block with the values that did best on the sequences held out."""
        tuned = Tuned.of(block, norms=self.norms)
        num_updates = block.num_mini_batches(self.batch)
        num_held_out = min(max(round(self.held_out * num_updates), self.held_out > 0), num_updates - 1)
        learnt, held_out = range(num_updates - num_held_out), range(num_updates - num_held_out, num_updates)
        first = self._error(block, tuned, held_out) if held_out else inf
        best, best_epoch, best_keep, best_values = first, 0, tuned.keep, tuned.values()
        mask, update = self._begin_again(block, tuned, sparsity, self.epochs * len(learnt)), 0
        if mask is not None:
            tuned = replace(tuned, keep=mask.keep)
        optimizer, schedule = self._optimizer(tuned, self.epochs * len(learnt))
        for epoch, order in enumerate(self._orders(len(learnt)), start=1):
            errors = torch.zeros(1, dtype=torch.float64, device=tuned.device)
            for mini_batch in block.mini_batches(self.batch, order):
                if mask is not None:
                    mask.follow(tuned.weights, update)
                optimizer.zero_grad()
                errors += self._accumulate(block, tuned, mini_batch)
                block.sum(tuned.gradients())
                optimizer.step()
                schedule.step()
                update += 1
            block.sum([errors])
            learning = errors.item() / len(learnt)
            error = self._error(block, tuned, held_out) if held_out else learning
            report({"epoch": epoch, "error": learning, **({"held_out": error} if held_out else {})})
            if (mask is None or mask.is_settled) and (error < best or not held_out):
                best, best_epoch, best_keep = error, epoch, tuned.keep
                tuned.copy_to(best_values)
        notes = {"epochs": float(best_epoch), "error_after": best, **({"error_before": first} if held_out else {})}
        return replace(tuned, keep=best_keep).result(best_values, notes)

    def _begin_again(
        self, block: BlockView, tuned: "Tuned", sparsity: Sparsity, num_updates: int
    ) -> GradualMask | None:
        """Have the dense block's weights tuned under a mask that is still to come; None where it came in and stays."""
        if not self.gradual:
            return None
        norms = {name: input_norms(block.statistic(name, ColumnSquares)) for name in tuned.weights}
        for name, weight_OD in tuned.weights.items():
            weight_OD.detach().copy_(block.weights[name])
        group = sparsity.group if isinstance(sparsity, SemiStructured) else None
        return GradualMask(tuned.keep, norms, group, num_updates)

    def _optimizer(
        self, tuned: "Tuned", num_updates: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return Adam, and what lets its steps fall to 0 along a cosine."""
        optimizer = torch.optim.Adam(tuned.parameter_groups(self.rate), fused=True)
        part = partial(_cosine, num_updates=num_updates)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, part)

    def _orders(self, num_updates: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield torch.randperm(num_updates, generator=generator).tolist()

    def _loss(self, block: BlockView, tuned: "Tuned", mini_batch: MiniBatch) -> tuple[torch.Tensor, float]:
        """Relative error of the block on the sequences at hand, and the scale for its backward pass."""
        output = block.output(tuned.makers(), mini_batch.here, tuned.others)
        loss = relative_error(output, block.target(mini_batch.here, self.target))
        if not torch.isfinite(loss):
            raise NumericsError(
                f"reconstruct's error became {loss.item()}; hidden states of this block are not finite in this dtype: "
                "use `compute.dtype: float32`, or lower `rate`"
            )
        return loss, loss_scale(output)

    def _accumulate(self, block: BlockView, tuned: "Tuned", mini_batch: MiniBatch) -> float:
        """Add the gradient of one mini-batch's error; return this replica's part of the error."""
        if mini_batch.weight == 0:
            return 0.0
        error, scale = self._loss(block, tuned, mini_batch)
        loss = mini_batch.weight * error
        torch.autograd.backward(loss * scale)
        torch._foreach_div_(tuned.gradients(), scale)
        return loss.item()

    @torch.no_grad()
    def _error(self, block: BlockView, tuned: "Tuned", updates: range) -> float:
        """Return the mean error over some of the updates, of all replicas."""
        total = torch.zeros(1, dtype=torch.float64, device=tuned.device)
        for mini_batch in block.mini_batches(self.batch, updates):
            if mini_batch.weight > 0:
                total += mini_batch.weight * self._loss(block, tuned, mini_batch)[0].double()
        block.sum([total])
        return total.item() / len(updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The parameters that are learnt, in float32: the kept weights of every linear, and others by their name."""

    weights: Mapping[str, torch.Tensor]
    keep: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    """In which the block runs."""

    @classmethod
    def of(cls, block: BlockView, *, norms: bool) -> "Tuned":
        """Start from what the steps before have made of the block."""
        weights, keep = {}, {}
        for name, pruned in block.so_far.items():
            kept = block.weights[name] if pruned.weight_OD is None else pruned.weight_OD
            weights[name] = (kept.float() * pruned.keep_OD).requires_grad_()
            keep[name] = pruned.keep_OD
        present = {**block.others, **block.tuned} if norms else {}
        others = {name: p.to(torch.float32, copy=True).requires_grad_() for name, p in present.items()}
        return cls(weights=weights, keep=keep, others=others, dtype=next(iter(block.weights.values())).dtype)

    @property
    def device(self) -> torch.device:
        """Where the block runs."""
        return next(iter(self.weights.values())).device

    def parameters(self) -> list[torch.Tensor]:
        """Return all that is learnt."""
        return [*self.weights.values(), *self.others.values()]

    def gradients(self) -> list[torch.Tensor]:
        """Return all gradients; zeros where the sequences at hand have given none."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]

    def parameter_groups(self, rate: float) -> list[dict[str, object]]:
        """Return each parameter with a step size in proportion to its own root mean square, zeros left out."""
        return [{"params": [p], "lr": rate * _root_mean_square(p)} for p in self.parameters()]

    def makers(self) -> dict[str, Maker]:
        """Return what makes each weight in the block's dtype; where it is pruned no gradient comes through."""
        return {name: partial(_masked, p, self.keep[name], self.dtype) for name, p in self.weights.items()}

    @torch.no_grad()
    def values(self) -> list[torch.Tensor]:
        """Return a copy of all values, in the block's dtype; zero where pruned."""
        return [make() for make in self._copies()]

    @torch.no_grad()
    def copy_to(self, values: Sequence[torch.Tensor]) -> None:
        """Put all values, in the block's dtype, where others were."""
        for value, make in zip(values, self._copies(), strict=True):
            value.copy_(make())

    def _copies(self) -> list[Maker]:
        others = [partial(torch.Tensor.to, p, self.dtype, copy=True) for p in self.others.values()]
        return [*self.makers().values(), *others]

    def result(self, values: Sequence[torch.Tensor], notes: Mapping[str, float]) -> PrunedBlock:
        """Return the block with these values."""
        by_name = dict(zip([*self.weights, *self.others], values, strict=True))
        linears = {
            name: PrunedLinear(keep_OD=self.keep[name], weight_OD=by_name[name], notes=dict(notes))
            for name in self.weights
        }
        return PrunedBlock(linears=linears, others={name: by_name[name] for name in self.others})


def _cosine(update: int, num_updates: int) -> float:
    """Return the part of the first step size at an update: 1 at the beginning, 0 after the last."""
    return (1 + cos(pi * update / num_updates)) / 2


def _masked(weight_OD: torch.Tensor, keep_OD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight_OD * keep_OD).to(dtype)


def _root_mean_square(parameter: torch.Tensor) -> float:
    values = parameter.detach()
    return (values.square().sum() / values.count_nonzero().clamp(min=1)).sqrt().item()
