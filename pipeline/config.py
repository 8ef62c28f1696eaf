"""One run as a validated value: YAML in, every problem out at once, each with its key path."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from pipeline.allocation_config import AllocationConfig, OwlConfig
from pipeline.calibration import CalibrationConfig
from pipeline.cluster_config import ClusterConfig
from pipeline.errors import ConfigError
from pipeline.memory_config import MemoryConfig
from pipeline.recipe import Recipe, WithinBlock, parse_recipe
from pipeline.sources import SourceField
from pipeline.sparsity import Sparsity, parse_sparsity

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML without numbers in base 60, in which 2:4 would be 124."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|nan))$"),
    list("-+.0123456789"),
)


class Section(BaseModel):
    """Part of a configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which model to prune."""

    path: Path | None = None
    """A model directory."""

    hub: str | None = None
    """A model on the Hugging Face hub, `org/name`."""

    revision: str = "main"
    """Hub revision; a commit hash makes the run reproducible."""

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a directory) or `hub` (org/name), not both and not neither")
        return self


AnySection = TypeVar("AnySection", bound=BaseModel)


class PruneConfig(Section):
    """How much to prune, and how."""

    sparsity: float | str = 0.5
    """Fraction of block weights removed, or KEPT:GROUP such as 2:4; of blocks, where the recipe only drops those."""

    allocation: AllocationConfig = AllocationConfig()
    """How it is spread over the blocks: `uniform`, or `owl: {options}`."""

    recipe: tuple[str | dict[str, Any], ...] = ("besa",)
    """Steps in order: names, or `name: {options}`."""

    within_block: WithinBlock = "joint"
    """Statistics are of the dense block (`joint`); or (`sequential`) those of an input are gathered anew once the
    linears before it are pruned, for some three more forward passes of parts of the block."""

    skip: tuple[str, ...] = ()
    """Linears left dense: names within the block, `*` allowed, such as `mlp.down_proj`."""

    @field_validator("sparsity")
    @classmethod
    def _is_a_sparsity(cls, value: float | str) -> float | str:
        if parse_sparsity(value) == parse_sparsity(0):
            raise ValueError("sparsity is 0; the fraction removed must be above 0 and below 1")
        return value

    @field_validator("recipe")
    @classmethod
    def _are_steps(cls, value: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        parse_recipe(value, None)
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        recipe = parse_recipe(self.recipe, self.target, self.within_block)
        if not recipe.steps and self.allocation.needs_survey:
            raise ValueError("allocation spreads what is masked over the blocks, and this recipe masks nothing")
        if not recipe.steps and self.skip:
            raise ValueError("skip names linears that are not masked, and this recipe masks nothing; leave it out")
        return self

    @property
    def target(self) -> Sparsity:
        """The asked sparsity as a value."""
        return parse_sparsity(self.sparsity)

    @property
    def steps(self) -> Recipe:
        """The recipe as checked steps."""
        return parse_recipe(self.recipe, self.target, self.within_block)


class ComputeConfig(Section):
    """Where and in what precision blocks run."""

    device: str = "auto"
    """`auto` (the accelerator if there is one), `cpu`, `cuda`, `cuda:1`, …"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's dtype on an accelerator, float32 on a CPU."""

    batch: int = Field(default=4, ge=1)
    """Sequences that go through a block at a time."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; torch's own choice when absent. Rounding depends on it, so a run that is to be
    repeated to the bit on another machine names it."""


class EvaluateConfig(Section):
    """Perplexity before and after, on text of its own."""

    source: SourceField = "embedded"
    """Text to evaluate on; `text: FILE` may stand here directly."""

    take: Literal["first", "last"] = "first"
    """Which end of the text the windows come from; `last` keeps clear of a calibration that takes the first."""

    sequence_length: int = Field(default=512, ge=2)
    """Tokens per window."""

    windows: int | None = Field(default=None, ge=1)
    """Windows to evaluate; all of the text when absent."""

    @model_validator(mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and "text" in value and "source" not in value:
            rest = {key: item for key, item in value.items() if key != "text"}
            return {"source": {"text": value["text"]}, **rest}
        return value


class RunConfig(Section):
    """One pruning run."""

    model: ModelConfig
    output: Path
    """The run directory: ledger, shards, report. Running again resumes it."""

    calibration: CalibrationConfig = CalibrationConfig()
    prune: PruneConfig = PruneConfig()
    compute: ComputeConfig = ComputeConfig()
    memory: MemoryConfig = MemoryConfig()
    evaluate: EvaluateConfig | None = None
    cluster: ClusterConfig | None = None
    """Where the blocks are spread over many workers; this process alone when absent."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key.path=value` overrides; raises ConfigError with all problems at once."""
    return parse_config(read_settings(path, overrides), str(path))


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of sections, with overrides, as plain data; raises ConfigError."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; a configuration is a mapping of sections")
    for override in overrides:
        _apply(raw, override)
    return raw


def parse_config(raw: dict[str, Any], origin: str) -> RunConfig:
    """Validate plain data; `origin` is named in the error message."""
    return absolute(validated(RunConfig, raw, origin))


def validated(kind: type[AnySection], raw: dict[str, Any], origin: str) -> AnySection:
    """Validate plain data as one section; raises ConfigError, naming `origin`, with all problems at once."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = [line for details in error.errors() for line in _describe(kind, details)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{origin}: {count}", *(f"  {p}" for p in problems)])) from None


def absolute(section: AnySection) -> AnySection:
    """Return a section with every path in it made absolute, so that it means the same wherever a run goes on."""
    changed: dict[str, Any] = {}
    for key, value in section:
        if isinstance(value, Path):
            changed[key] = value.absolute()
        elif isinstance(value, BaseModel):
            changed[key] = absolute(value)
    return section.model_copy(update=changed)


def resolved(config: RunConfig) -> dict[str, Any]:
    """Return the whole configuration as plain data, defaults filled in."""
    return config.model_dump(mode="json", exclude_none=True)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE, such as prune.sparsity=0.6")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        section[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None


def _describe(kind: type[BaseModel], details: ErrorDetails) -> list[str]:
    """Say one pydantic error in our words, with its key path."""
    path = ".".join(str(part) for part in details["loc"]) or "(top level)"
    if details["type"] == "extra_forbidden":
        return [f"{path}: unknown key{_nearest(kind, details['loc'])}"]
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return [f"{path}: {line}" for line in message.splitlines()]
    if details["type"] == "missing":
        return [f"{path}: required, but absent"]
    return [f"{path}: {message} (got {details['input']!r})"]


def _nearest(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Suggest a known key for an unknown one at `location` of a section, where its own section is one of ours."""
    section: Any = kind
    for part in location[:-1]:
        inside = isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields
        section = section.model_fields[str(part)].annotation if inside else None
        section = next((kind for kind in (EvaluateConfig, ClusterConfig, OwlConfig) if section == kind | None), section)
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ""
    near = get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(section.model_fields)}"
