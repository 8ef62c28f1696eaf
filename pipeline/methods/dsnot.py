"""DSnoT: mend a mask without training, by swapping kept and pruned weights of every row.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs" (2310.08915). With d a dense row
less the row as it is, each swap grows one pruned weight and prunes one kept weight of the row. Two criteria:

`mean`, the paper's: take the expected error, E[d·x] = sum_j d_j E[x_j], towards zero. Of the weights whose sign does,

    grow    the pruned weight with the largest  |w_j E[x_j]| / Var(x_j)
    prune   the kept weight with the smallest   |w_j| ||x_j||_2         (Wanda's score)

and nothing that has grown is pruned again, nor the other way round. In an N:M linear the weight to go is the lowest of
the group that grew, whatever its sign.

`error`: make the swap that most lowers the squared error on the calibration tokens, d G d^T with G = X^T X, which also
sees what the other weights of the row make up for.

Every row, and every N:M group, keeps its count. Where steps before have changed the kept weights, those keep their new
values, what grows takes its dense value, and d is the difference from the weights as they are.

Departures from the released code: all linears are mended; the tolerance is on the mean over tokens, so that the length
of sequences does not matter; the variance is over all tokens, as in the paper, and one of zero does no harm; a row
whose candidates are used up stops, and so does one whose expected error would change its sign, whatever the pattern;
and what would raise the squared error is refused.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from pipeline.methods.step import LinearStep, LinearView, PrunedLinear, Shapes, Solver, num_weights
from pipeline.methods.swaps import Features, Rows, swapped_by_error, swapped_by_mean
from pipeline.sparsity import in_slab, row_slabs
from pipeline.statistics import Gathered, Gram, Moments, Statistic

AUTHORS_TOLERANCE = 0.1 / 2048
"""The authors stop at 0.1 of the sum over the 2048 tokens of a sequence."""

SLAB_BYTES = 32
"""Bytes a weight of a slab of rows takes while its candidates are ranked, or its swaps made by squared error."""

CANDIDATE_BYTES = 48
"""Bytes of a candidate and those beside it: two queues of two lists, and one queue while it is put together."""


class Dsnot(LinearStep):
    """Swaps of kept and pruned weights within every row, without training."""

    accepts_mask: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = True

    criterion: Literal["mean", "error"] = "error"
    """What swaps are to lower: the expected error, as in the paper, or the squared error."""

    cycles: int = Field(default=50, ge=1)
    """Most swaps of a row."""

    tolerance: float = Field(default=AUTHORS_TOLERANCE, ge=0)
    """By mean: a row is done when its expected error, a mean over tokens, is this small."""

    overshoot: bool = False
    """By mean: whether a swap may take the expected error past zero. Otherwise such a swap ends the row."""

    guard: Literal["row", "linear", "none"] = "row"
    """What goes back to the mask it had, where swaps have raised its squared error on the calibration tokens: the row,
    or the whole linear. `none` keeps every swap; by mean it measures no error, and needs no Gram matrix."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Moments to swap by mean; a Gram matrix to swap by squared error, and to measure it."""
        if self.criterion == "error":
            return (Gram,)
        return (Moments,) if self.guard == "none" else (Moments, Gram)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """Masks of a byte a weight, new weights where a step before has changed them, and a slab of rows."""
        slabs = (
            in_slab(rows * columns) * (SLAB_BYTES + CANDIDATE_BYTES * min(self.cycles, columns) // columns)
            for rows, columns in shapes.values()
        )
        return num_weights(shapes) * (1 + dtype.itemsize) + max(slabs)

    def solver(self, gathered: Gathered) -> Solver:
        """Return the function that mends one linear; what it needs to know of the input is shared by all of them."""
        gram_DD = gathered.of(Gram).gram_DD if Gram in self.statistics else None
        if self.criterion == "error":
            assert gram_DD is not None
            swap = partial(swapped_by_error, gram_DD=gram_DD, cycles=self.cycles)
        else:
            swap = partial(
                swapped_by_mean,
                features=Features.of(gathered.of(Moments)),
                cycles=self.cycles,
                tolerance=self.tolerance,
                overshoot=self.overshoot,
            )
        return lambda view: self._mend(view, swap, gram_DD)

    def _mend(
        self, view: LinearView, swap: Callable[[Rows], torch.Tensor], gram_DD: torch.Tensor | None
    ) -> PrunedLinear:
        """Swap within all rows, a slab at a time, and take back what the guard refuses."""
        assert view.keep_OD is not None
        keep_OD = torch.empty(view.keep_OD.shape, dtype=torch.bool, device=view.keep_OD.device)
        swaps, errors = [], []
        for slab in row_slabs(*keep_OD.shape):
            rows = Rows.of(view, slab)
            keep_OD[slab] = swap(rows)
            swaps.append((keep_OD[slab] & ~rows.keep_RD).sum(dim=1))
            if gram_DD is not None:
                errors.append(rows.errors(keep_OD[slab], gram_DD))
        swaps_O, notes = torch.cat(swaps), dict[str, float]()
        if errors:
            refused_O, notes = self._judge(torch.cat(errors, dim=1))
            keep_OD[refused_O] = view.keep_OD[refused_O]
            swaps_O[refused_O] = 0
        notes["swaps"] = swaps_O.sum().item()
        return PrunedLinear(keep_OD=keep_OD, weight_OD=new_weights(view, keep_OD), notes=notes)

    def _judge(self, errors_3O: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Return which rows go back to the mask they had, and the errors then; see `Rows.errors`."""
        before_O, after_O, power_O = errors_3O
        refused_O = torch.zeros_like(after_O, dtype=torch.bool)
        if self.guard == "row":
            refused_O = after_O > before_O
        elif self.guard == "linear":
            refused_O |= after_O.sum() > before_O.sum()
        power = power_O.sum().item() or 1.0
        return refused_O, {
            "error_before": before_O.sum().item() / power,
            "error_after": torch.where(refused_O, before_O, after_O).sum().item() / power,
            "refused_rows": refused_O.sum().item(),
        }


def new_weights(view: LinearView, keep_OD: torch.Tensor) -> torch.Tensor | None:
    """Return the weights under the new mask, where a step before has changed them; what has grown is dense again."""
    if view.updated_OD is None or view.keep_OD is None:
        return None
    weight_OD = torch.empty_like(view.updated_OD, memory_format=torch.contiguous_format)
    for slab in row_slabs(*keep_OD.shape):
        present_RD = torch.where(view.keep_OD[slab], view.updated_OD[slab], view.dense_OD[slab])
        weight_OD[slab] = present_RD.masked_fill_(~keep_OD[slab], 0)
    return weight_OD
