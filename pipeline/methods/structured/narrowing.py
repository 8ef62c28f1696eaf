"""The step that makes blocks narrower: neurons and heads go by a metric, and what is left is mended in closed form.

    choose    which neurons stay, by the matrix condition (COMP) or a simpler score
    mend      several recoveries are worked out from the sequences that are learnt from
    judge     each is run on the sequences held out, against the dense block; where none helps, none is taken

Heads of the attention are units of several features, of which the linear that reads them is judged, and mended, as
that of the neurons is. They go first: the error that neurons are judged by is that of the block without these heads.

Shapes: O = out features of the linear that reads the units, U = units (neurons, or heads), D = its in features (U, but
for heads), K = those that are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator

from pipeline.attention import HeadUnit
from pipeline.methods.step import BlockView, Report, Shapes
from pipeline.methods.structured.judge import Judge, Mended
from pipeline.methods.structured.mask_problem import SLAB_NUMEL, MaskProblem
from pipeline.methods.structured.recovery import DAMPINGS, best_of, bias_of, folded, is_sound, solved
from pipeline.methods.structured.scores import SCORED_BY, score_of
from pipeline.methods.structured.selection import Metric, Rounds, Selection, keep_without_lowest, select
from pipeline.methods.structured.sized_step import DepthFraction, SizedStep
from pipeline.sequence_norms import SequenceNorms
from pipeline.sparsity import SemiStructured, Sparsity
from pipeline.statistics import Gathered, Gram, Moments, Statistic

NeuronMetric = Literal["condition", "forward", "kappa", "wanda_sp", "flap", "two_ssp"]
Recovery = Literal["mask", "lstsq", "bias", "none"]

_MENDED_BY: dict[Recovery, tuple[type[Statistic], ...]] = {
    "mask": (Gram,), "lstsq": (Gram,), "bias": (Moments,), "none": ()
}  # fmt: skip
"""What the recoveries need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The neurons of a block, or the heads of its attention, and what is asked of them."""

    reader: str
    """The linear that reads them, by its name within the block."""

    num_kept: int
    unit_size: int = 1
    """Features of a unit: 1 for neurons."""

    num_pools: int = 1
    """Runs of units of equal length that lose as many each: the query heads of one head of keys and values."""

    gathered: Gathered
    """Statistics of the reader's inputs, over the sequences of all replicas that are to be learnt from."""

    num_fitted: int
    """Sequences at hand, from the first on, that these are of; the others are held out."""

    @property
    def reader_bias(self) -> str:
        """The name of the reader's bias, where it has one."""
        return f"{self.reader}.bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutBlock:
    """What is to be left of a block."""

    keep_U: torch.Tensor
    """bool, by unit, True = kept."""

    folded_OK: torch.Tensor | None = None
    """New values of the columns of the reader that are left, or None where they stay as they are."""

    bias_O: torch.Tensor | None = None
    """New values of the reader's bias, or None where it stays as it is."""

    notes: dict[str, float] = field(default_factory=dict)
    """Figures worth recording with the commit."""


class Narrowing(SizedStep):
    """Removes neurons of all blocks, and whole blocks beside."""

    neuron_metric: NeuronMetric = "condition"
    """By what neurons are judged: how much the error rises when one goes and all others are rescaled (`condition`),
    what it alone carries (`forward`), how far others stand in for it (`kappa`), or scores of Wanda-sp, FLAP and 2SSP
    (`wanda_sp`, `flap`, `two_ssp`)."""

    recovery: Recovery = "mask"
    """What makes up for them: rescaling the others (`mask`), solving for all weights that read them (`lstsq`), what
    they gave on average as a bias of the linear that read them (`bias`: llama and granite only, whose config.json then
    says `mlp_bias`), or nothing (`none`). It is given up in a block where it does not help on the sequences held
    out."""

    rounds: int = Field(default=16, ge=1)
    """In so many rounds neurons go; after each the mask and the scores are brought up to date."""

    damping: float = Field(default=0.01, gt=0)
    """Ridge of the rounds, as a multiple of the neurons' mean size."""

    mask_var_max: float = Field(default=0.01, gt=0)
    """The largest variance of the mask; where a round would pass it, the mask stays as it was from then on."""

    multiple: int | None = Field(default=None, ge=1)
    """Of what number widths are to be multiples; absent: the largest of 256, 128, … 8 that costs little."""

    heads: float = Field(default=0.0, ge=0, lt=1)
    """The part of the attention's heads that goes in every block, rounded down to whole ones, at least one stays;
    neurons give the rest of what is asked. 0 leaves the attention as it is. Heads go by the same metric and recovery, a
    head being several columns that share an entry of the mask (2204.09656), before the neurons: with `within_block:
    sequential` these see inputs of the attention that is left, with `joint` of the dense one."""

    head_unit: HeadUnit = "group"
    """What goes as one: a head of keys and values with all query heads that share it (`group`: the cache shrinks too),
    or one query head of every such group (`query`)."""

    held_out: float = Field(default=0.125, gt=0, lt=1)
    """Part of the sequences that recoveries are judged on and not worked out from."""

    @model_validator(mode="after")
    def _heads_give_no_bias(self) -> Self:
        if self.heads and self.recovery == "bias":
            raise ValueError(
                "`recovery: bias` makes up for neurons alone, and heads are to go; choose mask, lstsq or none, or "
                "leave `heads` out"
            )
        return self

    def refusal(self, sparsity: Sparsity) -> str | None:
        """Refuse patterns: neurons and blocks go whole."""
        if isinstance(sparsity, SemiStructured):
            return (
                f"{self.method} removes neurons and whole blocks, which have no pattern such as {sparsity}; give a "
                "fraction, or put a step that masks weights after it"
            )
        return None

    @property
    def neuron_statistics(self) -> tuple[type[Statistic], ...]:
        """What the metric and the recovery need."""
        return tuple(dict.fromkeys((SCORED_BY.get(self.neuron_metric, Gram), *_MENDED_BY[self.recovery])))

    @property
    def needs_targets(self) -> bool:
        """Where there is a recovery to judge."""
        return self.recovery != "none"

    @property
    def num_recoveries(self) -> int:
        """How many are worked out and judged in every block, beside none."""
        return {"mask": len(DAMPINGS) + 1, "lstsq": len(DAMPINGS), "bias": 1, "none": 0}[self.recovery]

    def num_fitted(self, num_sequences: int) -> int:
        """Return all, or where there is a recovery to judge all but those held out: of two or more one at the least."""
        if not self.needs_targets or num_sequences < 2:
            return num_sequences
        return num_sequences - min(max(1, round(self.held_out * num_sequences)), num_sequences - 1)

    def working_bytes(self, shapes: Shapes, groups: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
        """A matrix of the features' pairs, the weights that read them and the best recovery of these, in float64."""
        readers = [groups[-1][-1], *([groups[1][-1]] if self.heads and len(groups) > 1 else [])]
        return max(self._working_bytes(*shapes[reader]) for reader in readers)

    def _working_bytes(self, num_rows: int, num_columns: int) -> int:
        if self.neuron_statistics == (SequenceNorms,):
            return 40 * num_columns  # scores and their order: no weight is looked at
        if Gram not in self.neuron_statistics:
            return 16 * num_rows * num_columns  # the weights, and their sizes
        matrices = 2 if Gram in _MENDED_BY[self.recovery] else 1
        return 8 * (num_columns**2 + matrices * num_rows * num_columns + 3 * SLAB_NUMEL)

    @torch.no_grad()
    def cut(self, block: BlockView, units: Units, report: Report) -> CutBlock:
        """Choose the units that stay; mend the block where that helps on the sequences held out.

        Raises ConfigError where a recovery is asked for and no sequence can be held out to judge it by, NumericsError
        where the Gram matrix cannot be factorised.
        """
        weight_OD = block.weights[units.reader]
        selection = self._choose(weight_OD, units)
        keep_U = selection.keep_U
        block.from_the_first(keep_U)
        if not self.needs_targets:
            return CutBlock(keep_U=keep_U, notes=selection.notes)
        judge = Judge(block, units.reader, units.num_fitted, keep_U.repeat_interleave(units.unit_size))
        best = best_of(self._recoveries(block, units, selection), judge.error)
        notes = {"error_before": judge.errors[0], "error_after": min(judge.errors), **best.figures}
        report({"error": notes["error_after"]})
        return CutBlock(keep_U=keep_U, folded_OK=best.folded_OK, bias_O=best.bias_O, notes={**selection.notes, **notes})

    def _choose(self, weight_OD: torch.Tensor, units: Units) -> Selection:
        gathered, size, pools = units.gathered, units.unit_size, units.num_pools
        num_pruned = (weight_OD.shape[1] // size - units.num_kept) // pools
        if self.neuron_metric in SCORED_BY:
            score_U = score_of(self.neuron_metric, weight_OD, gathered, size)
            keep_U = keep_without_lowest(score_U, num_pruned, pools)
            return Selection(keep_U=keep_U, mask_U=keep_U.double(), num_unmet=0, rise=0.0, notes={})
        rounds = Rounds(
            metric=cast(Metric, self.neuron_metric), num_rounds=self.rounds, damping=self.damping,
            mask_var_max=self.mask_var_max, at_bound="freeze",
        )  # fmt: skip
        problem = MaskProblem(weight_OD=weight_OD, gram_DD=gathered.of(Gram).gram_DD, unit_size=size)
        return select(problem, num_pruned, rounds, pools)

    def _recoveries(self, block: BlockView, units: Units, selection: Selection) -> Iterator[Mended]:
        """Yield what may make up for those that are gone, beginning with nothing; the same on every replica."""
        yield Mended(folded_OK=None)
        weight_OD, keep_U = block.weights[units.reader], selection.keep_U
        keep_D = keep_U.repeat_interleave(units.unit_size)
        if self.recovery == "bias":
            missing_O = bias_of(weight_OD, keep_D, units.gathered.of(Moments).mean_D)
            bias_O = block.others[units.reader_bias].double() + missing_O
            block.from_the_first(bias_O)
            yield Mended(folded_OK=None, bias_O=bias_O)
            return
        gram_DD = units.gathered.of(Gram).gram_DD
        if self.recovery == "lstsq":
            for damping in DAMPINGS:
                solved_OK, used = solved(weight_OD, gram_DD, keep_D, damping)
                solved_OK = solved_OK.contiguous()
                block.from_the_first(solved_OK)
                yield Mended(folded_OK=solved_OK, damping=used)
            return
        problem = MaskProblem(weight_OD=weight_OD, gram_DD=gram_DD, unit_size=units.unit_size)
        tuned = ((damping, problem.tuned(keep_U, damping)) for damping in DAMPINGS)
        for damping, mask_U in chain([(self.damping, selection.mask_U)], tuned):
            block.from_the_first(mask_U)
            if is_sound(mask_U):
                yield Mended(folded_OK=folded(weight_OD[:, keep_D], mask_U[keep_U]), damping=damping)


class Comp(Narrowing):
    """Removes neurons that the others can stand in for, rescales these, and drops blocks of least influence (COMP)."""

    method = "comp"

    depth_fraction: DepthFraction = 0.5
    """The part of what goes that goes with whole blocks, as far as whole ones fit into it; neurons make up the rest.
    With `auto` it is found out: no block, one, two, … up to all that fit (nine numbers of them at most, evenly spread)
    are each tried by a whole run on the calibration sequences less the part `held_out`, whose outputs are thrown away,
    and the one of the least perplexity on the sequences held out is taken. So it costs that many runs more, and is for
    where the split matters more than the time: which is better differs by model, ratio and text."""


class WandaSp(Narrowing):
    """Removes neurons of the least mean score of Wanda, and makes up for nothing (An et al., 2312.11983)."""

    method = "wanda_sp"

    neuron_metric: NeuronMetric = "wanda_sp"
    """By what neurons are judged; see comp."""

    recovery: Recovery = "none"
    """What makes up for them; see comp."""
