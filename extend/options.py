"""The options of every stage, as a recipe writes them. Imports no torch.

Every model is frozen and forbids unknown keys. Lengths are tokens; `8k` and `1m` mean 8192 and
1048576. Options end at the stage functions, which take plain keyword arguments (training, whose
options travel to other processes, takes its model whole).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from extend.adapter_options import AdapterReportOptions, CutOptions, ExtractOptions
from extend.option_types import (
    Bytes,
    FloatDtype,
    InputPath,
    Length,
    Number,
    Options,
    parse_number,
)
from extend.transfer_options import FitOptions, RepairOptions

# Options of evaluation tasks that name files, or models.
TASK_PATHS = ("haystack", "file", "text", "essays", "words", "reference", "evaluator",
              "include_path")
STRATEGIES = {"auto": False, "ring": False, "all-gather": False, "ulysses": False, "usp": True,
              "double-ring": True}
"""How a ring computes attention: name -> whether a number may follow it, as in `usp:4`."""


def parse_strategy(value: Any) -> str:
    """Read the name of a way to compute attention over several processes.

    Names are those of `extend.ring.strategies`, which needs torch; a test keeps the two alike.

    Raises:
        ValueError: no such name, or a number that is none or does not belong to it.
    """
    match = re.fullmatch(r"([a-z-]+)(:[1-9]\d*)?", str(value))
    takes_number = STRATEGIES.get(match[1]) if match else None
    if takes_number is None or (match[2] and not takes_number):
        known = ", ".join(f"{name}[:N]" if number else name for name, number in STRATEGIES.items())
        raise ValueError(f"{value!r} is no strategy; write one of {known}, where N is a number")
    return str(value)


class RopeOptions(Options):
    """A RoPE rescaling: a member of `extend.rope.METHODS`, its options and its target."""

    method: str = "critical"
    options: dict[str, Annotated[Any, BeforeValidator(parse_number)]] = {}
    """Keyword-only parameters of the method."""


def _parse_rope(value: Any) -> Any:
    """`auto` as the default method; whatever else is left to the model's own checks."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{value!r} is no RoPE; write auto, or a mapping with method and "
                             "options")
        return {}
    return value


RopeChoice = Annotated[RopeOptions, BeforeValidator(_parse_rope)]
"""A mapping with `method` and `options`, or `auto`: the method that composes over stages."""


class RescaleOptions(RopeOptions):
    """rescale: new RoPE keys for a checkpoint."""

    model: InputPath
    to: Length
    """Tokens, the context length the RoPE is made for."""
    from_len: Length | None = None
    """Native length of a model that is extended already: start again from plain RoPE there."""
    sliding_window: Literal["refuse", "drop", "keep"] = "refuse"


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


class Phase(Options):
    """A stretch of training at one length."""

    length: Length
    """Tokens per row."""
    steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Length | None = None
    """Tokens to train on; give this or `steps`."""
    batch_rows: Annotated[int, Field(ge=1)] = 1
    """Rows per optimizer step over all processes."""
    lr: Annotated[Number, Field(gt=0)]
    warmup_frac: Annotated[Number, Field(ge=0, le=1)] = 0.05
    min_lr_frac: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end of the cosine, as a fraction of `lr`."""
    rope: RopeChoice | None = None
    """RoPE of this phase, made from the model's own; none takes the schedule's `rope`, and without
    one keeps that of the phase before, in the first phase the model's own."""
    rope_to: Length | None = None
    """Length the RoPE is made for, not below `length`, which it is unless given."""

    @model_validator(mode="after")
    def _rope_for_the_rows(self) -> "Phase":
        if self.rope_to is not None and self.rope_to < self.length:
            raise ValueError(f"rope_to is {self.rope_to} but rows have {self.length} tokens; give "
                             "at least that, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_duration(self) -> "Phase":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        return self

    @property
    def num_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return max(1, round(self.tokens / (self.length * self.batch_rows)))


class TrainOptions(Options):
    """train: fine-tune on long rows."""

    model: InputPath
    schedule: Annotated[list[Phase], Field(min_length=1)]
    """Phases of growing length."""
    rope: RopeChoice | None = None
    """RoPE of each phase that has none of its own, made from the model's own for the longest length
    so far (`rope_to` or `length`). A phase within the native length keeps the model's own."""
    data: Annotated[list[DataSource], Field(min_length=1)]
    mode: Literal["full", "lora"] = "full"
    lora_rank: Annotated[int, Field(ge=1)] = 32
    trainable: list[str] = []
    """Regular expressions; only parameters whose name one of them matches are trained. With mode
    lora they choose the linear layers, by the names of their weights, that get an adapter."""
    answer_weight: Annotated[Number, Field(ge=0)] = 0.0
    """Adds this times the mean loss over answer tokens to the mean over all tokens."""
    layout: Literal["contiguous", "zigzag", "striped"] = "zigzag"
    kernel: str = "auto"
    strategy: Annotated[str, BeforeValidator(parse_strategy)] = "auto"
    """How attention over a row that several processes share is computed; auto is the fastest that
    fits in memory, `usp:N` splits heads over N processes, `double-ring:N` takes them for N hosts.
    """
    document_mask: bool = True
    """Tokens see only their own of the documents that are packed into one row."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimizer updates."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """auto: bfloat16 on CUDA, none on the CPU."""
    export_dtype: FloatDtype | None = None
    """Dtype of the written checkpoint; that of the input unless given."""
    activation_checkpointing: bool = True
    """Layers keep their input only and are computed again for their backward."""
    kept_attention: Literal["all"] | Annotated[int, Field(ge=0)] = "all"
    """In so many layers, from the first on, attention is not computed again: its output, as large
    as the layer's input, is kept too."""
    host_memory: Bytes = 0
    """Of all processes of a host together: what layers keep goes there, as far as it fits, while
    others compute; the rest stays on the device. A number of bytes, or text such as 180GiB."""
    kept_form: Literal["exact", "fp8"] = "exact"
    """fp8: layers keep their inputs in 8 bits, with a relative error of 2.6 %."""
    tile_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """MLPs and norms work on so many tokens at a time; auto: 16384, where a process has more than
    65536 tokens of a row; none: on all."""
    betas: tuple[Number, Number] = (0.9, 0.95)
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    clip_norm: Annotated[Number, Field(gt=0)] = 1.0
    loss_chunk: Annotated[int, Field(ge=1)] = 4096
    """Tokens whose logits exist at once."""
    save_every: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints."""
    nproc: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes; auto is one per visible GPU, or one."""
    seed: int = 0

    @model_validator(mode="after")
    def _growing(self) -> "TrainOptions":
        lengths = [phase.length for phase in self.schedule]
        if lengths != sorted(lengths):
            raise ValueError(f"schedule: lengths must not shrink, they are {lengths}")
        return self

    @model_validator(mode="after")
    def _rope_to_has_a_rope(self) -> "TrainOptions":
        """Otherwise the written length would grow without any change of the RoPE."""
        for phase in self.schedule:
            if phase.rope_to is not None and phase.rope is None and self.rope is None:
                raise ValueError(f"schedule: rope_to is {phase.rope_to} but no rope says how it "
                                 "is made; give rope, there or for all phases, or leave it out")
        return self


class MergeOptions(Options):
    """merge: adapters, or a long model's whole delta, into a fine-tune of the same base."""

    adapter: InputPath | list[InputPath] | None = None
    target: InputPath
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
