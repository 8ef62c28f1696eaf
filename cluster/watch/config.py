"""What to watch, what to make of it and where to put it: one YAML file, checked whole before anything is asked.

The `job` section is a run's configuration without `model` and `output`, which every release fills in for itself. No
token is ever written here: the hub's client takes it from the environment or its own cache.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, loaded lazily
from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator

from cluster.watch.gate_config import GateConfig
from cluster.watch.lifecycle import RetryPolicy
from cluster.watch.state import Limits
from pipeline.config import RunConfig, Section, absolute, read_settings, resolved, validated
from pipeline.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(value: Any) -> Any:
    """Return seconds from `90s`, `15m`, `6h`, `30d` or `2w`; anything else is returned as it is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value) if isinstance(value, str) else None
    return float(match[1]) * _UNITS[match[2]] if match else value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Size = Annotated[ByteSize, Field(gt=0)]


class SourceConfig(Section):
    """Where releases appear: exactly one of an organisation, a model, or a directory."""

    organisation: str | None = None
    """All models of a user or organisation on the hub."""

    model: str | None = None
    """One model on the hub, `org/name`."""

    revision: str = "main"
    """The branch of `model` that is watched."""

    directory: Path | None = None
    """A directory whose subdirectories are models."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(value is not None for value in (self.organisation, self.model, self.directory)) != 1:
            raise ValueError("give exactly one of `organisation`, `model` and `directory`")
        return self

    @property
    def label(self) -> str:
        """Name it, for people and in the state."""
        return self.organisation or self.model or str(self.directory)


class FilterConfig(Section):
    """Which releases are wanted; what is left out refuses nothing."""

    architectures: tuple[str, ...] = ()
    """Class names of config.json, such as LlamaForCausalLM."""

    licences: tuple[str, ...] = ()
    """Licences as the hub writes them, such as apache-2.0; a release without one is refused."""

    include: tuple[str, ...] = ()
    """Regular expressions, of which one must be found in the name."""

    exclude: tuple[str, ...] = ()
    """Regular expressions, of which none may be found in the name."""

    min_size: Size | None = None
    """Of the weights on disk."""

    max_size: Size | None = None
    max_age: Duration | None = None
    """Since the release was last changed, such as 30d."""

    @field_validator("include", "exclude")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value


class ScheduleConfig(Section):
    """When sources are asked: exactly one of an interval and a cron line."""

    every: Duration | None = None
    """An interval, such as 1h."""

    cron: str | None = None
    """Five fields: minute, hour, day of the month, month, day of the week."""

    timezone: str | None = None
    """Of the cron line; the machine's when absent."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.every is None) == (self.cron is None):
            raise ValueError("give either `every` (an interval) or `cron` (five fields)")
        return self


class PublishConfig(Section):
    """Where good models go: exactly one of a directory and a repository.

    In `repository`, `{name}` stands for the source's name without its organisation, `{sparsity}` for 50pct or 2of4.
    """

    directory: Path | None = None
    """Each release becomes DIRECTORY/NAME/REVISION."""

    repository: str | None = None
    """On the hub, such as my-org/{name}-pruned-{sparsity}; each release becomes a commit."""

    private: bool = True
    """Whether a repository that has to be made is private."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.directory is None) == (self.repository is None):
            raise ValueError("give either `directory` or `repository`")
        if self.repository is not None and "{name}" not in self.repository:
            raise ValueError("`repository` must have {name} in it, or all models would go to one repository")
        try:
            validate_repo_id((self.repository or "").format(name="name", sparsity="50pct") or "name")
        except (HFValidationError, LookupError, ValueError) as error:
            raise ValueError(
                f"`repository` is no name of a repository, ORG/NAME with {{name}} in it: {error}"
            ) from None
        return self


class LimitsConfig(Section):
    """How much may be under way at once, over all watchers of one state file."""

    jobs: int = Field(default=1, ge=1)
    disk: Size | None = None
    """What downloads and outputs under `work` may take."""


class SubmitConfig(Section):
    """The Ray cluster that prunes releases, as jobs; `work` must be in a file system that it shares."""

    address: str
    """URL of its job server, such as http://head:8265. Tokens are found as `secateur submit` finds them."""

    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    """Resources of a job's first process: 1 GPU for a job without a `cluster` section."""

    python: str = "python"
    """The interpreter on the cluster."""

    install: bool = False
    """Whether the cluster is to install what a job needs."""

    grace: Duration = 3600.0
    """From `secateur stop` to being killed."""


class RetryConfig(Section):
    """What happens after a failure."""

    attempts: int = Field(default=10, ge=1)
    """At one step of a release, before that is quarantined; with the waits below, after some eight hours."""

    first_wait: Duration = 60.0
    longest_wait: Duration = 6 * 3600.0
    interruptions: int = Field(default=20, ge=0)
    """Deaths of the watcher within one step of a release, before that is quarantined."""


class WebhookConfig(Section):
    """Where news goes: an address, which may stand here directly, or the name of an environment variable that holds one
    which is secret."""

    url: str | None = None
    url_from: str | None = None
    events: tuple[str, ...] = ("published", "quarantined")

    @model_validator(mode="before")
    @classmethod
    def _plain_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.url is None) == (self.url_from is None):
            raise ValueError("give either `url` or `url_from` (the name of an environment variable)")
        unknown = set(self.events) - {"published", "quarantined", "skipped"}
        if unknown:
            raise ValueError(f"unknown events {', '.join(sorted(unknown))}; known: published, quarantined, skipped")
        return self


class WatchConfig(Section):
    """All that a watcher is told."""

    state: Path
    """The SQLite file; its locks lie beside it."""

    work: Path
    """Where releases are downloaded and pruned; emptied as they come to an end."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    job: dict[str, Any]
    publish: PublishConfig
    submit: SubmitConfig | None = None
    """Where releases are pruned; a process of its own on this machine when absent."""

    filters: FilterConfig = FilterConfig()
    schedule: ScheduleConfig | None = None
    """Needed unless the command is given --once."""

    gate: GateConfig = GateConfig()
    limits: LimitsConfig = LimitsConfig()
    retry: RetryConfig = RetryConfig()
    settle: float = Field(default=60.0, ge=0)
    """Seconds for which a watched directory must not have changed before its model is taken as whole."""

    webhook: WebhookConfig | None = None

    @model_validator(mode="after")
    def _job_is_whole(self) -> Self:
        taken = {"model", "output"} & self.job.keys()
        if taken:
            raise ValueError(f"`job` must not have {' and '.join(sorted(taken))}: each release has its own")
        try:
            job = validated(RunConfig, {**self.job, "model": "MODEL", "output": "OUTPUT"}, "job")
        except ConfigError as error:
            raise ValueError("\n".join(f"job: {line.strip()}" for line in error.message.splitlines()[1:])) from None
        if job.evaluate is None and (self.gate.perplexity_ratio or self.gate.max_perplexity):
            raise ValueError("the gate looks at perplexity, so `job` needs an `evaluate` section")
        return self

    def run_config(self, model: Path, output: Path) -> RunConfig:
        """Return the run of one release."""
        raw = {**self.job, "model": {"path": str(model)}, "output": str(output)}
        return absolute(validated(RunConfig, raw, "job"))

    def recipe(self) -> dict[str, Any]:
        """Return what of the job a reader may know: no paths."""
        job = self.run_config(Path("/model"), Path("/output"))
        return {key: value for key, value in resolved(job).items() if key in ("prune", "compute")}

    @property
    def retry_policy(self) -> RetryPolicy:
        """The `retry` section as the life of a release knows it."""
        retry = self.retry
        return RetryPolicy(
            attempts=retry.attempts,
            first_wait=retry.first_wait,
            longest_wait=max(retry.longest_wait, retry.first_wait),
            interruptions=retry.interruptions,
        )

    @property
    def ceilings(self) -> Limits:
        """The `limits` section as the state knows it."""
        return Limits(jobs=self.limits.jobs, disk_bytes=self.limits.disk)


def load_watch_config(path: Path) -> WatchConfig:
    """Read a YAML file; raises ConfigError with all problems at once."""
    config = absolute(validated(WatchConfig, read_settings(path), str(path)))
    sources = tuple(absolute(source) for source in config.sources)
    return config.model_copy(update={"sources": sources})
