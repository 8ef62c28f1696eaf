"""Calibration text of the model's own, as it is asked for: all of it, or what it writes on from sequences of a text.

self
{self: {temperature: 0.8, top_k: 50}}
{self: {continues: {text: corpus.txt}, given: 16}}      16 sequences of the text, and the model goes on from them
"""

from typing import Annotated, Any, Self

from pydantic import Field, Tag, model_validator

from pipeline.sources import KINDS, Source, SourceField, SourceModel, Stored, by_kind


class SelfOptions(SourceModel):
    """How a model writes its own calibration text."""

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Logits are divided by it: below 1 likely tokens become likelier."""
    top_k: int | None = Field(default=None, ge=1)
    """Only so many of the likeliest tokens are drawn from; all when absent."""
    batch: int = Field(default=16, ge=1)
    """Sequences that are written at a time."""
    continues: SourceField | None = None
    """Text to go on from, where there is too little of it; absent: each sequence begins with the start token."""
    given: int | None = Field(default=None, ge=1)
    """With `continues`: how many sequences of that text come first, as they are. The model writes the others."""
    prompt: int = Field(default=32, ge=1)
    """With `continues`: tokens of a given sequence that the model goes on from; each time others, as far as they go."""

    @model_validator(mode="after")
    def _given_and_continues_go_together(self) -> Self:
        if (self.continues is None) != (self.given is None):
            raise ValueError(
                "continues names a text and given how many of its sequences come first, as they are: give both, or "
                "neither, and the model writes all by itself"
            )
        return self


class WrittenByModel(SourceModel):
    """Text that the model writes itself before it is pruned; takes memory for the whole model."""

    self: SelfOptions = SelfOptions()
    """How it writes."""

    @model_validator(mode="before")
    @classmethod
    def _plain_word(cls, value: Any) -> Any:
        return {"self": {}} if value == "self" else value


CalibrationSource = Source | WrittenByModel

CalibrationSourceField = Annotated[
    Stored | Annotated[WrittenByModel, Tag("self")], by_kind("the word embedded or self", (*KINDS, "self"))
]
"""`CalibrationSource` as a field."""
