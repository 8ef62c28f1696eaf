"""A recipe: the ordered steps that turn a dense block into a pruned one, and what they need of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from pipeline.methods import METHODS
from pipeline.methods.step import BlockStep, LinearStep, Step
from pipeline.sparsity import Sparsity
from pipeline.statistics import Statistic

WithinBlock = Literal["joint", "sequential"]
"""Whether the inputs of linears are those of the dense block, or of what is pruned of it before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps with their options, checked against each other."""

    steps: tuple[Step, ...]

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
    def needs_targets(self) -> bool:
        """Whether a block step compares with what the dense block makes of the pruned stream."""
        return any(step.target == "pruned" for step in self.block_steps)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether a block step compares with what the dense block makes of the dense stream."""
        return any(step.target == "dense" for step in self.block_steps)

    @property
    def num_boundaries(self) -> int:
        """How many boundaries are held: the pruned stream, and where asked targets and the dense stream."""
        return 1 + self.needs_targets + self.needs_dense_stream

    def as_data(self) -> list[JsonValue]:
        """Return every step with all its options, defaults filled in, as plain data."""
        return [{_name(step): step.model_dump(mode="json")} for step in self.steps]


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
        if within_block == "sequential" and not any(isinstance(s, LinearStep) and s.statistics for s in steps):
            problems.append(
                "within_block: sequential gathers statistics anew for linear steps, and this recipe has none that "
                "needs any; leave it out, or prune with wanda, sparsegpt, admm, …"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return Recipe(steps=tuple(steps), within_block=within_block)


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
    problems = []
    if not steps:
        problems.append("a recipe needs at least one step")
    for position, step in enumerate(steps):
        name = _name(step)
        if position == 0 and step.needs_mask:
            problems.append(f"[{position}] {name} refines a mask; put a step that chooses one before it, such as wanda")
        if position > 0 and not step.accepts_mask:
            problems.append(
                f"[{position}] {name} chooses a mask of its own, but {_name(steps[0])} has chosen one before "
                "it; put it first, or leave one of them out"
            )
        if position > 0 and steps[position - 1].quantises:
            problems.append(
                f"[{position}] {name} would take weights off the grids that {_name(steps[position - 1])} has put them "
                "on; quantize in the last step only"
            )
        if position == 0 and sparsity is not None and (reason := step.refusal(sparsity)) is not None:
            problems.append(f"[{position}] {reason}")
    return problems


def _name(step: Step) -> str:
    return next(name for name, method in METHODS.items() if type(step) is method)
