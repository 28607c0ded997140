"""The data of a training run, as a recipe writes it. Imports no torch."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from extend.option_types import InputPath, Length, Number, Options


def _check_name(name: str) -> str:
    if re.fullmatch(r"\d*", name):
        raise ValueError(f"{name!r} is no name of a source; a number means the source at that "
                         "place, so write a name with a letter")
    return name


SourceName = Annotated[str, AfterValidator(_check_name)]


class Upsampling(Options):
    """Long documents of a source more often than its others; the source keeps its share of rows."""

    min_length: Length
    """Tokens of a document that counts as long."""
    factor: Annotated[Number, Field(ge=1)]
    """How often it appears for each time that the others do; need not be a whole number."""


class TextData(Options):
    """Rows of packed documents, the end of each marked by the end-of-sequence token."""

    kind: Literal["text"]
    path: InputPath
    name: SourceName | None = None
    """What a phase's mix calls it."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share of rows, relative to the other sources."""
    column: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    document_length: Length | None = None
    """Longer documents are cut into pieces of so many tokens, which do not see one another, so that
    a long row holds many short documents. With `join` and `distill` only the teacher reads them
    apart."""
    upsample: Upsampling | None = None
    join: bool = False
    """Documents of a row see one another all the same, so that rows of short documents teach
    attention over their whole length. With `distill` the teacher still reads each by itself, longer
    ones in windows of `document_length` tokens, half of each to see what was before."""
    rope: Literal["phase", "native"] = "phase"
    """native: its rows are read with the model's own RoPE, not the phase's; no document may be
    longer than the model's own length, see `document_length`."""
    distill: bool = False
    """Its tokens teach what the `teacher` predicts, read with its own RoPE, and not the text
    itself: the loss is the divergence from that, so that short text is read as before. No document
    may be longer than the teacher's own length."""


class RetrievalData(Options):
    """Rows with facts hidden at random places and asked for at the end, in shuffled order."""

    kind: Literal["retrieval"]
    path: InputPath | None = None
    """Text to hide the facts in; none means repeated filler sentences."""
    name: SourceName | None = None
    """What a phase's mix calls it."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    facts: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1]
    """How many facts a row holds; each row draws one of these."""
    template: Literal["named", "varied", "classic"] = "named"
    """named: `The pass key for X is 12345.`; varied: each row draws a wording and a kind of values,
    so that facts are found in other words too; classic: the single fact of the passkey test."""
    column: str = "text"

    document_length: ClassVar = None
    join: ClassVar = False
    rope: ClassVar = "phase"
    distill: ClassVar = False


class ExampleData(Options):
    """Rows of whole examples from JSON lines, to teach a skill: prompt and answer, or messages."""

    kind: Literal["examples"]
    path: InputPath
    """Each line has `prompt` and `answer`, or `messages` for the tokenizer's chat template."""
    name: SourceName | None = None
    """What a phase's mix calls it."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    mask_prompt: bool = True
    """Take the loss over answers only; of messages, over all that the assistant says."""
    rope: Literal["phase", "native"] = "phase"
    """native: its rows are read with the model's own RoPE, not the phase's; no example may be
    longer than the model's own length."""
    distill: bool = False
    """Its tokens teach what the `teacher` predicts, as in `text`."""

    document_length: ClassVar = None
    join: ClassVar = False


DataSource = Annotated[TextData | RetrievalData | ExampleData, Field(discriminator="kind")]

Mix = dict[str | int, Annotated[Number, Field(ge=0)]]
"""Name of a source, or its place from 0 on, to its share of rows."""


def check_sources(data: Sequence[DataSource], document_mask: bool) -> None:
    """Check what sources ask for together.

    Raises:
        ValueError: two of one name, or short documents that see one another.
    """
    names = [source.name for source in data if source.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data: {names.count(name)} sources are named {name!r}; a mix could "
                             "not tell them apart, so give each its own name")
    for number, source in enumerate(data):
        asks = {"document_length": source.document_length is not None,
                "rope: native": source.rope == "native", "distill": source.distill}
        if source.join and source.distill and document_mask:  # only what the teacher reads is apart
            asks = {"rope: native": asks["rope: native"]}
        seen = ("document_mask is false" if not document_mask else
                "join is true" if source.join else None)
        key = next((key for key, asked in asks.items() if asked), None)
        if key and seen:
            raise ValueError(f"data[{number}]: {key} needs documents that do not see one another, "
                             f"but {seen}; leave one of the two out")


def source_weights(data: Sequence[DataSource], mix: Mix | None) -> list[float]:
    """Share of rows of every source; those that a mix does not name have none.

    Raises:
        ValueError: a mix with an unknown name, one source twice, or nothing above 0.
    """
    if mix is None:
        return [source.weight for source in data]
    weights = [0.0] * len(data)
    named = {source.name: place for place, source in enumerate(data) if source.name is not None}
    seen: dict[int, str | int] = {}
    for key, weight in mix.items():
        place = named.get(key) if not str(key).isdigit() else int(key)
        if place is None or place >= len(data):
            raise ValueError(f"no source is called {key!r}; there are {_list(data)}")
        if place in seen:
            raise ValueError(f"{seen[place]!r} and {key!r} are the same source; name it once")
        seen[place] = key
        weights[place] = weight
    if not any(weights):
        raise ValueError(f"no source has a weight above 0 in {dict(mix)}; give one to at least one "
                         f"of {_list(data)}")
    return weights


def _list(data: Iterable[DataSource]) -> str:
    return ", ".join(str(place) if source.name is None else f"{source.name!r} ({place})"
                     for place, source in enumerate(data))
