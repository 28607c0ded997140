"""The data of a training run, as a recipe writes it. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from extend.option_types import InputPath, Number, Options


class TextData(Options):
    """Rows of packed documents, the end of each marked by the end-of-sequence token."""

    kind: Literal["text"]
    path: InputPath
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share of rows, relative to the other sources."""
    column: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""


class RetrievalData(Options):
    """Rows with facts hidden at random places and asked for at the end, in shuffled order."""

    kind: Literal["retrieval"]
    path: InputPath | None = None
    """Text to hide the facts in; none means repeated filler sentences."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    facts: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1]
    """How many facts a row holds; each row draws one of these."""
    template: Literal["named", "classic"] = "named"
    """named: `The pass key for X is 12345.`; classic: the single fact of the passkey test."""
    column: str = "text"


class ExampleData(Options):
    """Rows of packed prompt and answer pairs from JSON lines, to teach a skill."""

    kind: Literal["examples"]
    path: InputPath
    weight: Annotated[Number, Field(gt=0)] = 1.0
    mask_prompt: bool = True
    """Take the loss over answers only."""


DataSource = Annotated[TextData | RetrievalData | ExampleData, Field(discriminator="kind")]
