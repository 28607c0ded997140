"""The options of `fit` and `repair`, as a recipe writes them. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from extend.option_types import InputPath, Length, ModelPath, Number, Options


class LessonOptions(Options):
    """What is learnt from: prompts without labels, and long rows with made-up facts."""

    prompts: InputPath | None = None
    """JSON lines with `prompt`, or text files with one a line."""
    max_prompts: Annotated[int, Field(ge=2)] = 64
    """Drawn from those, half of them to judge by."""
    sample: Annotated[int, Field(ge=0)] = 0
    """Short texts that the target writes itself, as more prompts or in place of them."""
    max_new: Annotated[int, Field(ge=1)] = 64
    """Most tokens of an answer."""
    text: InputPath | None = None
    """Text to hide the facts in; none means repeated filler sentences."""
    length: Length | None = None
    """Tokens of a long row; the long context, but at most 32k, unless given."""
    rows: Annotated[int, Field(ge=0)] = 8
    """Long rows, half of them to judge by; 0 leaves the long context out."""
    facts: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 8]
    """How many facts a row holds; each row draws one of these."""
    keep: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Weight of the target's answers against the long context."""
    device: str = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> "LessonOptions":
        if self.prompts is None and self.sample < 2:
            raise ValueError(f"no prompts, and sample is {self.sample}; give prompts, or let the "
                             "target write at least 2 texts")
        if self.rows == 1 or (self.rows == 0 and self.keep < 1):
            raise ValueError(f"rows is {self.rows} and keep {self.keep}; give at least 2 rows, or "
                             "0 rows and keep 1")
        return self


class FitOptions(LessonOptions):
    """fit: weights of a merge for each group of parameters."""

    target: ModelPath
    adapter: ModelPath | None = None
    tuned: ModelPath | None = None
    """In place of an adapter: the delta is tuned - base."""
    base: ModelPath | None = None
    """Also for an adapter with whole values, from which the base's are subtracted."""
    rope_from: ModelPath | None = None
    """For an adapter without a sidecar, the model whose RoPE and lengths the merge gets."""
    groups: Literal["kind", "layer", "module"] = "kind"
    """kind: attention, MLP and norms of each layer."""
    steps: Annotated[int, Field(ge=0)] = 40
    """Most steps from each of the two starts."""
    lr: Annotated[Number, Field(gt=0)] = 0.05

    @model_validator(mode="after")
    def _one_delta(self) -> "FitOptions":
        if (self.adapter is None) == (self.tuned is None):
            raise ValueError("give either an adapter, or both tuned and base")
        if self.tuned is not None and self.base is None:
            raise ValueError(f"tuned is {self.tuned} but there is no base to subtract from it")
        return self


class RepairOptions(LessonOptions):
    """repair: a few steps after which a merged model answers as its target did."""

    merged: ModelPath
    reference: ModelPath
    """The target before the merge."""
    steps: Annotated[int, Field(ge=0)] = 100
    lr: Annotated[Number, Field(gt=0)] | None = None
    """2e-5 for all weights, 2e-4 for a LoRA, unless given."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Train a LoRA of this rank and add it; none trains all weights of the layers."""
