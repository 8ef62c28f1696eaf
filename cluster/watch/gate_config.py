"""What a pruned model must be before it is published, as the `gate` section of a watch configuration says it."""

from pathlib import Path

from pydantic import Field

from pipeline.config import Section


class TaskConfig(Section):
    """One task of lm-eval, and what the pruned model must reach in it."""

    metric: str = "acc"
    min: float | None = None
    """The least value."""

    max_drop: float | None = Field(default=None, ge=0)
    """The most that may be lost against the dense model, which is then evaluated too."""


class TasksConfig(Section):
    """Tasks of lm-eval (`pip install 'secateur[tasks]'`). They hold the whole model in memory."""

    directory: Path | None = None
    """Where task files of your own are."""

    limit: int | None = Field(default=None, ge=1)
    """Examples a task; all when absent."""

    batch: int = Field(default=1, ge=1)
    tasks: dict[str, TaskConfig] = Field(min_length=1)


class GateConfig(Section):
    """What a pruned model must be before it is published."""

    perplexity_ratio: float | None = Field(default=None, ge=1)
    """The most that perplexity may grow, after by before; needs `job.evaluate`."""

    max_perplexity: float | None = Field(default=None, gt=1)
    """The most that it may be; needs `job.evaluate`."""

    sparsity_tolerance: float = Field(default=0.005, ge=0)
    """How far the fraction removed may be from the one asked for: each row rounds down, by less than one weight."""

    verify: bool = True
    """Hold every tensor on disk against its source and the ledger."""

    lm_eval: TasksConfig | None = None
