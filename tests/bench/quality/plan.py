"""What the quality bench runs: `quality.yaml` as a validated value, and its runs in order."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, StringConstraints, model_validator

from pipeline.config import ComputeConfig, EvaluateConfig, PruneConfig, Section, validated
from pipeline.errors import ConfigError
from pipeline.sources import TextFile

BENCH = Path(__file__).with_name("quality.yaml")
SMALLER = Path(__file__).with_name("smaller.yaml")

Amount = float | str
"""A sparsity as it is written: 0.5, or "2:4"."""

Size = Annotated[str, StringConstraints(pattern=r"^[1-9]\d*x[1-9]\d*$")]
"""A calibration set's size, `SEQUENCESxTOKENS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pruning run of the bench."""

    recipe: str
    """Its name in the bench."""

    sparsity: Amount
    size: str
    seed: int
    """Which stretch of the calibration text."""

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        sequences, tokens = shape_of(self.size)
        return sequences * tokens

    def as_data(self) -> dict[str, Any]:
        """Return the run as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.recipe} {spelled(self.sparsity)} {self.size} seed {self.seed}"


class Contender(Section):
    """A recipe as the bench knows it."""

    prune: dict[str, Any]
    """The `prune` section of its runs, without the sparsity."""

    calibration: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace the bench's, such as another source: the seed is then a seed."""

    continued: int = Field(default=0, ge=0)
    """Sequences more, in which the model goes on from those of the bench."""

    sparsities: tuple[Amount, ...] | None = None
    """Those it can be asked for; all of the bench when absent."""

    priority: int = Field(default=1, ge=1)
    """Taken up by rounds of this number and above."""


class Round(Section):
    """Runs of about the same worth to the reader."""

    priority: int = Field(ge=1)
    """Takes every recipe up to this priority."""

    sparsities: tuple[Amount, ...]
    seeds: tuple[int, ...]
    size: Size | None = None
    """The bench's first size when absent."""

    recipes: tuple[str, ...] | None = None
    """Only these, by name."""


class References(Section):
    """Perplexities of the authors' own code: seed 0, the first size, the first text."""

    dense: float
    recipes: dict[str, dict[Amount, float]]
    """By recipe and sparsity; a recipe need not be one of the bench."""

    def best(self, sparsity: Amount) -> float | None:
        """Return the lowest perplexity at a sparsity; None where there is no reference."""
        return min((figures[sparsity] for figures in self.recipes.values() if sparsity in figures), default=None)

    def mark(self, sparsity: Amount) -> float | None:
        """Return what to reach: half of the gap that the best reference leaves to the dense model."""
        best = self.best(sparsity)
        return None if best is None else (self.dense + best) / 2


class Bench(Section):
    """The whole bench."""

    name: str = Field(pattern="^[a-z]+$")
    """Of its tables in the README, and of its picture."""

    calibrate: TextFile
    sizes: tuple[Size, ...] = Field(min_length=1)
    evaluate: dict[str, EvaluateConfig] = Field(min_length=1)
    """Held-out texts by name; the first is in domain."""

    compute: ComputeConfig
    recipes: dict[str, Contender]
    rounds: tuple[Round, ...]
    references: References

    @model_validator(mode="after")
    def _every_run_is_possible(self) -> Self:
        for run in self.runs():
            try:
                validated(PruneConfig, self.prune_of(run), f"recipes.{run.recipe} at {spelled(run.sparsity)}")
            except ConfigError as error:
                raise ValueError(error.message) from None
        sizes = {size for entry in self.rounds if (size := entry.size) is not None}
        names = {name for entry in self.rounds for name in entry.recipes or ()}
        for kind, asked, known in (("sizes", sizes, self.sizes), ("recipes", names, tuple(self.recipes))):
            if unknown := asked.difference(known):
                raise ValueError(f"rounds ask for the {kind} {sorted(unknown)}; the bench's are {', '.join(known)}")
        return self

    @property
    def in_domain(self) -> str:
        """Name of the text that the references are for."""
        return next(iter(self.evaluate))

    def runs(self, only: str = "", num_seeds: int | None = None) -> list[Run]:
        """Return the runs whose text contains `only`, of the first `num_seeds` seeds, in the order of the rounds."""
        wanted = (run for entry in self.rounds for run in self._runs_of(entry))
        chosen = (run for run in wanted if only in str(run) and (num_seeds is None or run.seed < num_seeds))
        return list(dict.fromkeys(chosen))

    def _runs_of(self, entry: Round) -> Iterator[Run]:
        """Yield a round: whole tables of a seed one after the other, so that an early end leaves no holes."""
        for seed, sparsity, (name, recipe) in product(entry.seeds, entry.sparsities, self.recipes.items()):
            able = recipe.sparsities is None or sparsity in recipe.sparsities
            asked = recipe.priority <= entry.priority and (entry.recipes is None or name in entry.recipes)
            if able and asked:
                yield Run(recipe=name, sparsity=sparsity, size=entry.size or self.sizes[0], seed=seed)

    def prune_of(self, run: Run) -> dict[str, Any]:
        """Return the `prune` section of a run's configuration."""
        return {**self.recipes[run.recipe].prune, "sparsity": run.sparsity}


def load_bench(path: Path = BENCH) -> Bench:
    """Read a bench; raises ConfigError with every problem at once."""
    return validated(Bench, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def shape_of(size: str) -> tuple[int, int]:
    """Read `16x256` as sequences and tokens."""
    sequences, _, tokens = size.partition("x")
    return int(sequences), int(tokens)


def spelled(sparsity: Amount) -> str:
    """Return 0.5 as `50%`; a pattern as it is."""
    return f"{sparsity:.0%}" if isinstance(sparsity, float) else sparsity
