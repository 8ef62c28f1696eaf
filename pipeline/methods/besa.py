"""BESA: learn how much each row drops, so that the pruned block reproduces the dense block.

Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation"
(2402.16880). Weights never change, and the order in which a row's weights go is Wanda's, fixed beforehand; what is
learnt is *how many* go: one sparsity per row (or per linear) of all linears of a block together, by gradient
descent on

    mean over channels of |Y - Y_ref|^2 / |Y_ref|^2  +  penalty * ((S_block - S) / S)^2

Departures from the released code: its parametrisation confines sparsities to 0.38…0.62 whatever the target, so here
it is tilted, and starts at the target; a projection meets the budget exactly; the mask gradient is in closed form.

Two things may be learnt beyond that. `mix`, for N:M patterns: how many of every M weights each row (or linear) keeps, N
of them on average over the block; what has been learnt is then held against the pattern itself, and the better of them
stays. `quantize`, section 3.3 of the paper: the ends of the grids that kept weights are put on (see `quantisation.py`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from prodigyopt import Prodigy
from pydantic import Field

from pipeline.errors import NumericsError
from pipeline.methods.learnable import Granularity, Learnable, learnable
from pipeline.methods.pattern_mix import LEEWAY, nearest_mix
from pipeline.methods.quantisation import Quantize, slab_bytes
from pipeline.methods.row_sparsity import NUM_CANDIDATES, project_to_budget
from pipeline.methods.step import (
    BlockStep,
    BlockView,
    MiniBatch,
    PrunedBlock,
    Report,
    Shapes,
    largest,
    loss_scale,
    num_weights,
)
from pipeline.methods.wanda import input_norms
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured, rank_dtype, selection_bytes
from pipeline.statistics import ColumnSquares, Statistic, relative_error
from pipeline.stream_names import StreamName

TENSORS_PER_PARAMETER = 10
"""The parameters, Prodigy's three tensors, gradients, and what autograd keeps of the shares."""

MIX_REACH = 16.0
"""How much further shares reach in a mix of patterns."""

WAYS = (0.0, 0.5, 1.0)
"""How far towards what has been learnt a mix of patterns is tried."""


class Besa(BlockStep):
    """Blockwise parameter-efficient sparsity allocation."""

    granularity: Granularity = "row"
    """What learns a sparsity of its own: every row, or every linear."""

    mix: bool = False
    """For an N:M pattern: every row (or linear) keeps as many of each group as it has learnt, 1 to M - 1, and N on
    average. Off, there is nothing to learn of N:M, nor is there in a mix of 1:M, or of one less than M; both are
    refused, and so is a mix where a fraction is asked."""

    quantize: Quantize | None = None
    """Put kept weights on grids of few levels, whose ends are learnt together with the sparsities."""

    target: StreamName = "pruned"
    """Stream on which the dense block makes the reference output: the pruned stream, or the dense stream."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the calibration sequences."""

    batch: int = Field(default=1, ge=1)
    """Sequences per update, of each replica."""

    penalty: float = Field(default=5.0, gt=0)
    """Weight of the squared relative distance from the target sparsity."""

    reach: float = Field(default=1.0, gt=0)
    """How far rows may move from the target: shares of candidates change by a factor of at most e^reach; of at most
    e^(16 reach) in a mix of patterns, where one whole count is a long way from the next."""

    growth: float = Field(default=5.0, gt=0)
    """Prodigy's d_coef: scales the step size that it finds by itself."""

    first_step: float = Field(default=0.05, gt=0)
    """Prodigy's d0, the step size it starts from. The parameters are of order 1 for every model, so a step this size
    is safe, and a few updates suffice; from Prodigy's own 1e-6 a dozen are spent on growing it."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Wanda's, whose order of weights is kept."""
        return (ColumnSquares,)

    @property
    def quantises(self) -> bool:
        """Whether kept weights are put on grids."""
        return self.quantize is not None

    def refusal(self, sparsity: Sparsity) -> str | None:
        """Say that exactly N:M leaves nothing to learn, asked or the only mix; or that a fraction cannot be mixed."""
        if isinstance(sparsity, Unstructured) and self.mix:
            return (
                f"besa's `mix` learns how many of every N:M group each row keeps, and the fraction {sparsity} has no "
                "groups; leave `mix` out, or ask for a pattern such as 2:4"
            )
        if isinstance(sparsity, Unstructured):
            return None
        if not self.mix:
            return (
                f"besa learns how many weights each row drops, which {sparsity} fixes; use wanda or sparsegpt for "
                f"{sparsity} everywhere, `besa: {{mix: true}}` for {sparsity} on average (with `granularity: linear`, "
                "each linear in a pattern of its own), or a fraction such as 0.5"
            )
        if sparsity.keep in (1, sparsity.group - 1) and not self.quantises:
            return (
                f"besa's `mix` keeps 1 to {sparsity.group - 1} of every {sparsity.group} weights, so that {sparsity} "
                f"on average is {sparsity} everywhere; use wanda or sparsegpt, or ask for a pattern such as 2:4"
            )
        return None

    def rounding(self, sparsity: Sparsity, shapes: Shapes) -> int:
        """Return how many weights more than N:M a mix may drop of a block: see `whole_counts`."""
        if not isinstance(sparsity, SemiStructured):
            return super().rounding(sparsity, shapes)
        if self.granularity == "linear":
            return int(LEEWAY * num_weights(shapes))
        return max(columns for _, columns in shapes.values()) // sparsity.group - 1

    @property
    def num_trials(self) -> int:
        """Passes over the calibration sequences once all is learnt, to choose among mixes of patterns."""
        return len(WAYS) if self.mix else 0

    def num_parameters(self, shapes: Collection[tuple[int, int]]) -> int:
        """Return how many numbers are learnt of linears of these shapes, at most."""
        grids = [
            0 if self.quantize is None else 2 * rows * self.quantize.num_grids(columns) for rows, columns in shapes
        ]
        groups = [rows if self.granularity == "row" else 1 for rows, _ in shapes]
        return NUM_CANDIDATES * sum(groups) + sum(grids)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Ranks, parameters, and the gradient of one linear's masked weight with that weight, or with its sums.

        Masks take the place of the ranks, linear by linear; quantised weights come beside them. Of a mix this is more
        than it holds, as the pattern is not known here: a rank within a group takes a byte, and a group has M + 1
        candidates, where ranks within rows and all candidates of a fraction are counted.
        """
        ranks = sum(rows * columns * rank_dtype(columns).itemsize for rows, columns in shapes.values())
        selection, results = selection_bytes(largest(shapes)), 0
        if self.quantises:
            selection, results = slab_bytes(largest(shapes)), dtype.itemsize * num_weights(shapes)
        masked = dtype.itemsize * largest(shapes)
        parameters = 4 * self.num_parameters(shapes.values()) * TENSORS_PER_PARAMETER
        return ranks + parameters + max(masked + max(masked, selection), results)

    def prune(self, block: BlockView, sparsity: Sparsity, report: Report) -> PrunedBlock:
        """Learn the sparsities of one block, project them to its budget, and return the masks."""
        linears = [self._learnable(block, name, sparsity) for name in block.weights]
        optimizer = Prodigy(
            [p for linear in linears for p in linear.parameters], d0=self.first_step, d_coef=self.growth
        )
        for epoch in range(self.epochs):
            for mini_batch in block.mini_batches(self.batch):
                optimizer.zero_grad()
                figures = self._accumulate(linears, block, mini_batch, sparsity.ratio)
                block.sum([gradient for linear in linears for gradient in linear.gradients()])
                optimizer.step()
                report({"epoch": epoch, **figures})
        counts = self._counts(linears, block, sparsity)
        return PrunedBlock(
            linears={linear.name: linear.pruned(count_O) for linear, count_O in emptied(linears, counts)}
        )

    def _learnable(self, block: BlockView, name: str, sparsity: Sparsity) -> Learnable:
        norm_D = input_norms(block.statistic(name, ColumnSquares))
        reach = self.reach * (MIX_REACH if isinstance(sparsity, SemiStructured) else 1.0)
        return learnable(name, block.weights[name], norm_D, sparsity, self.granularity, reach, self.quantize)

    @torch.no_grad()
    def _counts(self, linears: list[Learnable], block: BlockView, sparsity: Sparsity) -> list[torch.Tensor]:
        """Return how many weights of each stretch every row drops, int64 [O] per linear, within the budget.

        Of N:M mixes on the way from the pattern itself to what has been learnt, the one under which the block errs
        least on the calibration sequences: whole counts are coarse, and what has been learnt may have overshot.
        """
        learnt = [linear.alphas(linear.shares()) for linear in linears]
        if isinstance(sparsity, Unstructured):
            return whole_counts(linears, learnt, sparsity)
        errors, ways = [], []
        for way in WAYS:
            alphas = [sparsity.ratio + way * (alpha_G - sparsity.ratio) for alpha_G in learnt]
            ways.append(whole_counts(linears, alphas, sparsity))
            errors.append(self._error(linears, ways[-1], block))
        return ways[int(torch.stack(errors).argmin())]

    def _error(self, linears: list[Learnable], counts: list[torch.Tensor], block: BlockView) -> torch.Tensor:
        """Return the block's error with that many weights dropped, summed over the updates of a pass."""
        weights = {linear.name: linear.maker_of(count_O) for linear, count_O in zip(linears, counts, strict=True)}
        error = torch.zeros((), device=linears[0].weight_OD.device)
        for mini_batch in block.mini_batches(self.batch):
            if mini_batch.weight > 0:
                output_BTD = block.output(weights, mini_batch.here)
                error += mini_batch.weight * relative_error(output_BTD, block.target(mini_batch.here, self.target))
        block.sum([error])
        return error

    def _accumulate(
        self, linears: list[Learnable], block: BlockView, mini_batch: MiniBatch, target: float
    ) -> Mapping[str, float]:
        """Add the gradient of one mini-batch's loss to the parameters; return the figures of the step.

        Summed over replicas, the losses are the errors' weighted mean, and the penalty once.
        """
        shares_of = [linear.shares() for linear in linears]
        weights = {linear.name: linear.maker(share) for linear, share in zip(linears, shares_of, strict=True)}
        expected = block_sparsity(linears, shares_of)
        error, scale = torch.zeros_like(expected), 1.0
        if mini_batch.weight > 0:
            output_BTD = block.output(weights, mini_batch.here)
            error = relative_error(output_BTD, block.target(mini_batch.here, self.target))
            scale = loss_scale(output_BTD)
        distance = ((expected - target) / target) ** 2
        loss = mini_batch.weight * error + self.penalty / block.num_replicas * distance
        torch.autograd.backward(loss * scale)
        for linear in linears:
            torch._foreach_div_(linear.gradients(), scale)
        figures = {"error": error.item(), "sparsity": expected.item()}
        if not torch.isfinite(loss):
            raise NumericsError(
                f"besa's loss became {loss.item()} (reconstruction error {figures['error']:g}, block sparsity "
                f"{figures['sparsity']:g}); hidden states of this block are not finite in this dtype: use "
                "`compute.dtype: float32`, or lower `growth`"
            )
        return figures


def block_sparsity(linears: list[Learnable], shares_of: list[torch.Tensor]) -> torch.Tensor:
    """Return the expected fraction removed from the block, weighted by size, differentiable."""
    total = sum(r.weight_OD.numel() for r in linears)
    parts = [r.alphas(s).mean() * (r.weight_OD.numel() / total) for r, s in zip(linears, shares_of, strict=True)]
    return torch.stack(parts).sum()


def emptied(linears: list[Learnable], counts: Sequence[torch.Tensor]) -> Iterator[tuple[Learnable, torch.Tensor]]:
    """Yield linears with their counts, taken out of the list, so that the ranks of each make room for its mask."""
    for count_O in counts:
        yield linears.pop(0), count_O


def whole_counts(
    linears: Sequence[Learnable], alphas: Sequence[torch.Tensor], sparsity: Sparsity
) -> list[torch.Tensor]:
    """Turn sparsities [G] into how many weights of each stretch every row drops, within the budget of the block.

    Unstructured, the block loses exactly floor(ratio * weights) weights. Under N:M it keeps N of M, less what rounding
    to whole counts may take: less than a row's count where rows learn, and LEEWAY where linears do. Every group drops 1
    to M - 1 weights, as N:M itself does, so that there always is such a mix.
    """
    rows, sizes = [len(linear.weight_OD) for linear in linears], [linear.weight_OD.numel() for linear in linears]
    if isinstance(sparsity, SemiStructured) and all(len(alpha_G) == 1 for alpha_G in alphas):
        kept = nearest_mix([alpha_G.item() for alpha_G in alphas], sizes, sparsity)
        return [torch.full((num,), sparsity.group - keep) for num, keep in zip(rows, kept, strict=True)]
    alphas = [alpha_G.expand(num) for alpha_G, num in zip(alphas, rows, strict=True)]
    widths = [linear.stretch for linear in linears]
    units = [linear.weight_OD.shape[1] // linear.stretch for linear in linears]
    least = 1 if isinstance(sparsity, SemiStructured) else 0
    return project_to_budget(alphas, widths, sparsity.num_pruned(sum(sizes)), units, least)
