"""The options of every stage, as a recipe writes them. Imports no torch.

Every model is frozen and forbids unknown keys. Lengths are tokens; `8k` and `1m` mean 8192 and
1048576. Options end at the stage functions, which take plain keyword arguments (training, whose
options travel to other processes, takes its model whole).
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from extend.adapter_options import AdapterReportOptions, CutOptions, ExtractOptions
from extend.option_types import (
    FloatDtype,
    InputPath,
    Length,
    Number,
    Options,
    RopeOptions,
    parse_number,
)
from extend.train_options import TrainOptions
from extend.transfer_options import FitOptions, RepairOptions

# Options of evaluation tasks that name files, or models.
TASK_PATHS = ("haystack", "file", "text", "essays", "words", "reference", "evaluator",
              "include_path")


class RescaleOptions(RopeOptions):
    """rescale: new RoPE keys for a checkpoint."""

    model: InputPath
    to: Length
    """Tokens, the context length the RoPE is made for."""
    from_len: Length | None = None
    """Native length of a model that is extended already: start again from plain RoPE there."""
    sliding_window: Literal["refuse", "drop", "keep"] = "refuse"


class MergeOptions(Options):
    """merge: adapters, or a long model's whole delta, into a fine-tune of the same base."""

    adapter: InputPath | list[InputPath] | None = None
    target: InputPath | list[InputPath] | dict[str, InputPath]
    """A fine-tune, or several: a list, or label -> fine-tune. Of several each is merged by a stage
    of its own, called NAME-LABEL, where a list's labels are the last parts of its paths."""
    weight: Number | list[Number] = 1.0
    """Of all deltas, or one for each adapter and then one for tuned - base."""
    tuned: InputPath | None = None
    """A long model; tuned - base is added, with no LoRA between."""
    base: InputPath | None = None
    method: str = "add"
    """A member of `extend.merge.METHODS`, or one of mergekit's, such as `mergekit:ties`."""
    options: dict[str, Annotated[Any, BeforeValidator(parse_number)]] = {}
    """Keyword-only parameters of the method; of mergekit's also `target.NAME`, `long.NAME`."""
    layer_weights: Number | list[Number] | dict[str, Number] | InputPath | None = None
    """A number, a list laid over the layers, name or expression -> number, or a JSON file."""
    sidecar: bool = True
    rope_from: InputPath | None = None
    dtype: FloatDtype | None = None

    @model_validator(mode="after")
    def _targets_told_apart(self) -> "MergeOptions":
        label_targets(self.target)
        return self

    @model_validator(mode="after")
    def _some_delta(self) -> "MergeOptions":
        if not self.adapter and self.tuned is None:
            raise ValueError("there is nothing to merge; give adapter, or tuned and base")
        if self.tuned is not None and self.base is None:
            raise ValueError(f"tuned is {self.tuned} but there is no base to subtract from it")
        return self


class EvalOptions(Options):
    """eval: a grid of tasks, lengths and depths."""

    model: InputPath
    tasks: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """Names, or mappings with `task`, its options, and its own lengths, depths or trials."""
    lengths: list[Length] = []
    depths: Annotated[int, Field(ge=1)] = 10
    """Number of equally spaced depths from 0 to 1."""
    trials: Annotated[int, Field(ge=1)] = 5
    adapter: InputPath | None = None
    base: InputPath | None = None
    """The model before its context was extended: a control at its native length."""
    template: Literal["auto", "base", "chat"] = "auto"
    """chat puts every prompt into the model's chat template."""
    thinking: Annotated[int, Field(ge=0)] = 0
    """Tokens that a thinking model may think before it answers; needs template chat."""
    chunk: Length | None = None
    """Most tokens in one forward; chosen for the device by default."""
    nproc: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    context_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes, one a GPU, that share every row by ring attention."""
    server: str | dict[str, Any] | None = None
    """Address of an OpenAI-compatible server that runs the model, or `url` and how to ask it."""
    seed: int = 0


class ReportOptions(Options):
    """report: results of several models side by side."""

    results: Annotated[dict[str, InputPath], Field(min_length=1)]
    """Label -> results.json, its directory, or the name of an eval stage."""
    title: str = ""
    training: InputPath | None = None
    """Output of a train stage, for the loss curve."""


STAGES: dict[str, type[Options]] = {
    "rescale": RescaleOptions, "train": TrainOptions, "extract": ExtractOptions,
    "cut": CutOptions, "adapter-report": AdapterReportOptions, "merge": MergeOptions,
    "fit": FitOptions, "repair": RepairOptions, "eval": EvalOptions, "report": ReportOptions}


def label_targets(target: Any) -> dict[str, str] | None:
    """Label -> path of the targets of a merge that has several; None where there is one.

    Raises:
        ValueError: no targets, a label that cannot be part of a stage's name, or two alike.
    """
    if isinstance(target, str):
        return None
    pairs = list(target.items()) if isinstance(target, dict) else [
        (_label_of(path), path) for path in target]
    labels = [label for label, _ in pairs]
    for label in labels:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", label):
            raise ValueError(f"{label!r} is no label of letters, digits, - and _")
        if labels.count(label) > 1:
            raise ValueError(f"two targets are called {label!r}; write them as label: path")
    if not pairs:
        raise ValueError("there are no targets; give at least one")
    return dict(pairs)


def output_names(entry: Any) -> list[Any]:
    """What the stages of an entry of a recipe are called; whatever is wrong with it."""
    if not isinstance(entry, dict):
        return [None]
    labels = None
    with contextlib.suppress(TypeError, ValueError):  # told where the options are read
        labels = label_targets(entry.get("target")) if entry.get("stage") == "merge" else None
    name = entry.get("name")
    return [f"{name}-{label}" for label in labels] if labels else [name]


def _label_of(path: str) -> str:
    """The last part of a path, or of a repository's name without its revision."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", path.rstrip("/").rpartition("/")[2].partition("@")[0])


def _is_path(metadata: Sequence[Any]) -> bool:
    return "input path" in metadata


def input_paths(options: BaseModel) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield (location, value) of every field that names an input."""
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        text = "input path" in str(field.annotation) or _is_path(field.metadata)
        if isinstance(value, str) and text:
            yield (name,), value
        elif isinstance(value, dict) and text:
            yield from (((name, key), item) for key, item in value.items() if isinstance(item, str))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, str) and text:
                    yield (name, i), item
                elif isinstance(item, BaseModel):
                    yield from (((name, i, *loc), v) for loc, v in input_paths(item))
                elif isinstance(item, dict):
                    yield from (((name, i, key), item[key]) for key in TASK_PATHS
                                if item.get(key) not in (None, "self"))


def resolve_inputs(options: Options, resolve: Callable[[str], str]) -> Options:
    """Return the options with every input path replaced by `resolve(value)`."""
    data = options.model_dump()
    for location, value in input_paths(options):
        target = data
        for part in location[:-1]:
            target = target[part]
        target[location[-1]] = resolve(value)
    return type(options).model_validate(data)
