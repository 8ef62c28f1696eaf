"""A recipe: the ordered steps that turn a dense block into a pruned one, and what they need of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from pipeline.methods import METHODS
from pipeline.methods.step import BlockStep, LinearStep, Step
from pipeline.methods.structured.narrowing import Narrowing
from pipeline.methods.structured.shape_step import ShapeStep
from pipeline.sparsity import Sparsity
from pipeline.statistics import Statistic

WithinBlock = Literal["joint", "sequential"]
"""Whether the inputs of linears are those of the dense block, or of what is pruned of it before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps with their options, checked against each other."""

    steps: tuple[Step, ...]
    """Those that mask and mend weights, block by block; none where blocks only go."""

    shape: ShapeStep | None = None
    """What makes the model smaller before that, if anything."""

    within_block: WithinBlock = "joint"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Distinct statistics that must be collected of every linear's inputs."""
        return tuple(dict.fromkeys(kind for step in self.steps for kind in step.statistics))

    @property
    def block_steps(self) -> tuple[BlockStep, ...]:
        """The steps that see the whole block."""
        return tuple(step for step in self.steps if isinstance(step, BlockStep))

    @property
    def narrowing(self) -> Narrowing | None:
        """The step that takes neurons out of blocks, if there is one."""
        return self.shape if isinstance(self.shape, Narrowing) else None

    @property
    def at_work(self) -> tuple[Step, ...]:
        """All that works on a block, in turn: what takes neurons out of it, and the other steps."""
        return self.steps if self.narrowing is None else (self.narrowing, *self.steps)

    @property
    def neuron_statistics(self) -> tuple[type[Statistic], ...]:
        """Statistics that must be collected, beside, of the input of the linear that reads the neurons."""
        return () if self.narrowing is None else self.narrowing.neuron_statistics

    @property
    def needs_targets(self) -> bool:
        """Whether a step compares with what the dense block makes of the pruned stream."""
        mends = self.narrowing is not None and self.narrowing.needs_targets
        return mends or any(step.target == "pruned" for step in self.block_steps)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether a block step compares with what the dense block makes of the dense stream."""
        return any(step.target == "dense" for step in self.block_steps)

    @property
    def num_boundaries(self) -> int:
        """How many boundaries are held: the pruned stream, and where asked targets and the dense stream."""
        return 1 + self.needs_targets + self.needs_dense_stream

    def part_removed(self, target: Sparsity) -> Fraction:
        """Return the part of all blocks' parameters that is to go for good; target: what the run is asked for."""
        if self.shape is None:
            return Fraction(0)
        return target.fraction if self.shape.ratio is None else Fraction(repr(self.shape.ratio))

    def as_data(self) -> list[JsonValue]:
        """Return every step with all its options, defaults filled in, as plain data."""
        everything = self.steps if self.shape is None else (self.shape, *self.steps)
        return [{_name(step): step.model_dump(mode="json")} for step in everything]


def parse_recipe(
    entries: Sequence[str | dict[str, Any]], sparsity: Sparsity | None, within_block: WithinBlock = "joint"
) -> Recipe:
    """Read `[besa]`, `[{besa: {epochs: 2}}, sparsegpt]`, …; raises ValueError with every problem, one a line.

    Without a sparsity, whether the steps can prune to it is left open.
    """
    steps: list[Step] = []
    problems: list[str] = []
    for position, entry in enumerate(entries):
        try:
            steps.append(_parse_step(entry))
        except ValueError as error:
            problems += [f"[{position}] {line}" for line in str(error).splitlines()]
    if not problems:
        problems = _disagreements(steps, sparsity)
        heads_go = any(isinstance(step, Narrowing) and step.heads for step in steps)
        by_linears = any(isinstance(step, LinearStep) and step.statistics for step in steps)
        if within_block == "sequential" and not (by_linears or heads_go):
            problems.append(
                "within_block: sequential gathers statistics anew for linear steps, and this recipe has none that "
                "needs any, nor removes heads before neurons; leave it out, or prune with wanda, sparsegpt, admm, …"
            )
    if problems:
        raise ValueError("\n".join(problems))
    shape = steps[0] if isinstance(steps[0], ShapeStep) else None
    return Recipe(steps=tuple(steps if shape is None else steps[1:]), shape=shape, within_block=within_block)


def _parse_step(entry: str | dict[str, Any]) -> Step:
    if isinstance(entry, dict) and len(entry) != 1:
        raise ValueError(f"a step is a name or one `name: {{options}}`, not {entry!r}")
    name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    if name not in METHODS:
        near = get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"no method is called {name!r}{hint} Known: {', '.join(METHODS)}")
    try:
        return METHODS[name].model_validate({} if options is None else options)
    except ValidationError as error:
        known = ", ".join(METHODS[name].model_fields) or "none"
        lines = [f"{'.'.join(map(str, (name, *e['loc'])))}: {e['msg']} (options: {known})" for e in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _disagreements(steps: Sequence[Step], sparsity: Sparsity | None) -> list[str]:
    problems = _shape_disagreements(steps, sparsity)
    if not steps:
        problems.append("a recipe needs at least one step")
    first = 1 if steps and isinstance(steps[0], ShapeStep) else 0
    for position, step in enumerate(steps):
        name = _name(step)
        if isinstance(step, ShapeStep):
            continue
        if position == first and step.needs_mask:
            problems.append(f"[{position}] {name} refines a mask; put a step that chooses one before it, such as wanda")
        if position > first and not step.accepts_mask:
            problems.append(
                f"[{position}] {name} chooses a mask of its own, but {_name(steps[first])} has chosen one before "
                "it; put it first, or leave one of them out"
            )
        if position > first and steps[position - 1].quantises:
            problems.append(
                f"[{position}] {name} would take weights off the grids that {_name(steps[position - 1])} has put them "
                "on; quantize in the last step only"
            )
        if position == first and sparsity is not None and (reason := step.refusal(sparsity)) is not None:
            problems.append(f"[{position}] {reason}")
    return problems


def _shape_disagreements(steps: Sequence[Step], sparsity: Sparsity | None) -> list[str]:
    """What is wrong with a step that removes blocks: it comes first, once, and one setting says how much it takes."""
    shapes = [(position, step) for position, step in enumerate(steps) if isinstance(step, ShapeStep)]
    problems = [
        f"[{position}] {_name(step)} removes blocks before anything is pruned; put it first, and only one such step"
        for position, step in shapes
        if position > 0
    ]
    if not shapes or problems:
        return problems
    shape, is_alone = shapes[0][1], len(steps) == 1
    if is_alone and shape.ratio is not None:
        problems.append(
            f"[0] {_name(shape)}.ratio is for recipes with further steps; alone, the part that goes is prune.sparsity: "
            f"leave the ratio out and set prune.sparsity to {shape.ratio:g}"
        )
    if not is_alone and shape.ratio is None:
        problems.append(
            f"[0] {_name(shape)}.ratio is missing: with further steps, prune.sparsity is what they mask of the blocks "
            "that stay; give the part of the blocks' parameters that goes, such as 0.1"
        )
    if is_alone and sparsity is not None and (reason := shape.refusal(sparsity)) is not None:
        problems.append(f"[0] {reason}")
    return problems


def _name(step: Step) -> str:
    return next(name for name, method in METHODS.items() if type(step) is method)
