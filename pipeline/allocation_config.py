"""The `prune.allocation` setting: whether all blocks lose the same share of their weights, or those with outliers less.

Written `uniform`, `owl`, or `{owl: {spread: 0.08, threshold: 5}}`.
"""

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)


class OwlConfig(BaseModel):
    """Outlier-weighed allocation (OWL): the more outliers a block has, the less it loses."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    spread: float = 0.08
    """Half of what lies between the blocks with the most and the fewest outliers, as a fraction of their weights."""

    threshold: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """A weight is an outlier where its Wanda score is more than this many times the mean score of its block."""

    @field_validator("spread")
    @classmethod
    def _lies_within_all(cls, value: float) -> float:
        if not 0 < value <= 0.5:
            raise ValueError(
                f"the spread is {value:g}; twice as much lies between the block that loses most and the one that loses "
                "least, so it is above 0 and at most 0.5 (for no spread: allocation: uniform)"
            )
        return value


class AllocationConfig(BaseModel):
    """How the asked sparsity is spread over the blocks; uniform where no way is named."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    owl: OwlConfig | None = None
    """By outliers."""

    @property
    def needs_survey(self) -> bool:
        """Whether the dense model is looked through first."""
        return self.owl is not None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value == "uniform":
            return {}
        if isinstance(value, str) and value in cls.model_fields:
            return {value: {}}
        if isinstance(value, dict):
            return {name: {} if options is None else options for name, options in value.items()}
        if isinstance(value, cls):
            return value
        raise ValueError(f"an allocation is uniform, owl or {{owl: {{options}}}}, not {value!r}")

    @model_serializer(mode="wrap")
    def _as_named(self, plain: SerializerFunctionWrapHandler) -> Any:
        return plain(self) if self.needs_survey else "uniform"
