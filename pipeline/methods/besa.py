"""BESA: learn how much each row drops, so that the pruned block reproduces the dense block.

Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation"
(2402.16880). Weights never change, and the order in which a row's weights go is Wanda's, fixed beforehand; what is
learnt is *how many* go: one sparsity per row (or per linear) of all linears of a block together, by gradient
descent on

    mean over channels of |Y - Y_ref|^2 / |Y_ref|^2  +  penalty * ((S_block - S) / S)^2

Departures from the released code: its parametrisation confines sparsities to 0.38…0.62 whatever the target, so here
it is tilted, and starts at the target; a projection meets the budget exactly; the mask gradient is in closed form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from prodigyopt import Prodigy
from pydantic import Field

from pipeline.errors import NumericsError
from pipeline.lazy_weights import Maker
from pipeline.methods.row_sparsity import (
    NUM_CANDIDATES,
    MaskedWeight,
    candidate_sparsities,
    hard_keep,
    project_to_budget,
    pruned_counts,
    shares,
    tilt_towards,
)
from pipeline.methods.step import BlockStep, BlockView, MiniBatch, PrunedBlock, PrunedLinear, Report, Shapes, largest
from pipeline.methods.wanda import input_norms, wanda_scores
from pipeline.sparsity import Sparsity, Unstructured, map_rows, rank_dtype, row_ranks, selection_bytes
from pipeline.statistics import ColumnSquares, Statistic, relative_error
from pipeline.stream_names import StreamName

TENSORS_PER_PARAMETER = 10
"""The parameters, Prodigy's three tensors, gradients, and what autograd keeps of the shares."""


class Besa(BlockStep):
    """Blockwise parameter-efficient sparsity allocation."""

    accepts_pattern: ClassVar[bool] = False

    granularity: Literal["row", "linear"] = "row"
    """What learns a sparsity of its own: every row, or every linear."""

    target: StreamName = "pruned"
    """Stream on which the dense block makes the reference output: the pruned stream, or the dense stream."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the calibration sequences."""

    batch: int = Field(default=1, ge=1)
    """Sequences per update, of each replica."""

    penalty: float = Field(default=5.0, gt=0)
    """Weight of the squared relative distance from the target sparsity."""

    reach: float = Field(default=1.0, gt=0)
    """How far rows may move from the target: shares of candidates change by a factor of at most e^reach."""

    growth: float = Field(default=5.0, gt=0)
    """Prodigy's d_coef: scales the step size that it finds by itself."""

    first_step: float = Field(default=0.05, gt=0)
    """Prodigy's d0, the step size it starts from. The parameters are of order 1 for every model, so a step this size
    is safe, and a few updates suffice; from Prodigy's own 1e-6 a dozen are spent on growing it."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Wanda's, whose order of weights is kept."""
        return (ColumnSquares,)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Ranks, parameters, and the gradient of one linear's masked weight with that weight, or with its sums.

        Masks take the place of the ranks, linear by linear.
        """
        ranks = sum(rows * columns * rank_dtype(columns).itemsize for rows, columns in shapes.values())
        groups_of_rows = sum(rows for rows, _ in shapes.values()) if self.granularity == "row" else len(shapes)
        parameters = 4 * NUM_CANDIDATES * groups_of_rows * TENSORS_PER_PARAMETER
        masked = dtype.itemsize * largest(shapes)
        return ranks + parameters + masked + max(masked, selection_bytes(largest(shapes)))

    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> PrunedBlock:
        """Learn the sparsities of one block, project them to its budget, and return the masks."""
        assert isinstance(sparsity, Unstructured)
        rows = [self._learnable(block, name, sparsity) for name in block.weights]
        optimizer = Prodigy([r.theta_GP for r in rows], d0=self.first_step, d_coef=self.growth)
        for epoch in range(self.epochs):
            for mini_batch in block.mini_batches(self.batch):
                optimizer.zero_grad()
                figures = self._accumulate(rows, block, mini_batch, sparsity.ratio)
                block.sum([r.gradient() for r in rows])
                optimizer.step()
                report({"epoch": epoch, **figures})
        return PrunedBlock(linears=masks_within_budget(rows, sparsity))

    def _learnable(self, block: BlockView, name: str, sparsity: Unstructured) -> "LearnableRows":
        weight_OD, norm_D = block.weights[name], input_norms(block.statistic(name, ColumnSquares))
        num_groups = len(weight_OD) if self.granularity == "row" else 1
        return LearnableRows(
            name=name,
            weight_OD=weight_OD,
            rank_OD=map_rows(
                lambda rows: row_ranks(wanda_scores(rows, norm_D)), weight_OD, rank_dtype(weight_OD.shape[1])
            ),
            theta_GP=torch.zeros(num_groups, NUM_CANDIDATES, device=weight_OD.device, requires_grad=True),
            tilt_P=tilt_towards(sparsity.ratio, weight_OD.device),
            reach=self.reach,
        )

    def _accumulate(
        self, rows: list["LearnableRows"], block: BlockView, mini_batch: MiniBatch, target: float
    ) -> Mapping[str, float]:
        """Add the gradient of one mini-batch's loss to the parameters; return the figures of the step.

        Summed over replicas, the losses are the errors' weighted mean, and the penalty once.
        """
        shares_of = [r.shares() for r in rows]
        weights = {r.name: r.masked_weight(share) for r, share in zip(rows, shares_of, strict=True)}
        expected = block_sparsity(rows, shares_of)
        error = torch.zeros_like(expected)
        if mini_batch.weight > 0:
            error = relative_error(block.output(weights, mini_batch.here), block.target(mini_batch.here, self.target))
        distance = ((expected - target) / target) ** 2
        loss = mini_batch.weight * error + self.penalty / block.num_replicas * distance
        torch.autograd.backward(loss)
        figures = {"error": error.item(), "sparsity": expected.item()}
        if not torch.isfinite(loss):
            raise NumericsError(
                f"besa's loss became {loss.item()} (reconstruction error {figures['error']:g}, block sparsity "
                f"{figures['sparsity']:g}); hidden states of this block are not finite in this dtype: use "
                "`compute.dtype: float32`, or lower `growth`"
            )
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnableRows:
    """One linear with the parameters of its rows' sparsities."""

    name: str
    weight_OD: torch.Tensor
    rank_OD: torch.Tensor
    theta_GP: torch.Tensor
    tilt_P: torch.Tensor
    reach: float

    def shares(self) -> torch.Tensor:
        """Return each group's distribution over candidate sparsities, float32 [G, P]."""
        return shares(self.theta_GP, self.tilt_P, self.reach)

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the parameters, once there is one."""
        assert self.theta_GP.grad is not None
        return self.theta_GP.grad

    def alphas(self, share_GP: torch.Tensor) -> torch.Tensor:
        """Return the sparsity of each group, float32 [G]."""
        return share_GP @ candidate_sparsities(share_GP.device)

    def masked_weight(self, share_GP: torch.Tensor) -> Maker:
        """Return what makes the weight under its present hard mask, differentiable in the shares."""
        counts_G = pruned_counts(self.alphas(share_GP.detach()), self.weight_OD.shape[1])
        return partial(MaskedWeight.apply, share_GP, self.weight_OD, self.rank_OD, counts_G)


def block_sparsity(rows: list[LearnableRows], shares_of: list[torch.Tensor]) -> torch.Tensor:
    """Return the expected fraction removed from the block, weighted by size, differentiable."""
    total = sum(r.weight_OD.numel() for r in rows)
    parts = [r.alphas(s).mean() * (r.weight_OD.numel() / total) for r, s in zip(rows, shares_of, strict=True)]
    return torch.stack(parts).sum()


@torch.no_grad()
def masks_within_budget(rows: list[LearnableRows], sparsity: Unstructured) -> dict[str, PrunedLinear]:
    """Return the final masks: the block loses exactly floor(ratio * weights) weights.

    Takes the linears out of `rows`, so that the ranks of each make room for its mask.
    """
    alphas = [r.alphas(r.shares()).expand(len(r.weight_OD)) for r in rows]
    budget = sparsity.num_pruned(sum(r.weight_OD.numel() for r in rows))
    counts = project_to_budget(alphas, [r.weight_OD.shape[1] for r in rows], budget)
    pruned = {}
    for count_O in counts:
        r = rows.pop(0)
        share = count_O.double() / r.weight_OD.shape[1]
        notes = {"row_sparsity_min": share.min().item(), "row_sparsity_max": share.max().item()}
        pruned[r.name] = PrunedLinear(keep_OD=hard_keep(r.rank_OD, count_O.to(r.rank_OD.device)), notes=notes)
    return pruned
