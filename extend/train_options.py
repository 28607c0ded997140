"""The options of `train`, as a recipe writes them. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from extend.data_options import DataSource, Mix, check_sources, source_weights
from extend.option_types import Bytes, FloatDtype, Length, ModelPath, Number, Options, RopeChoice

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


class Phase(Options):
    """A stretch of training at one length."""

    length: Length
    """Tokens per row."""
    steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Length | None = None
    """Tokens to train on; give this or `steps`."""
    batch_rows: Annotated[int, Field(ge=1)] = 1
    """Rows per optimizer step over all processes."""
    context_parallel: Annotated[int, Field(ge=1)] = 1
    """At least so many processes share each row, or all where there are fewer; more where the rows
    do not divide over the groups. Rows beyond one for each group follow one another."""
    lr: Annotated[Number, Field(gt=0)]
    warmup_frac: Annotated[Number, Field(ge=0, le=1)] = 0.05
    min_lr_frac: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end of the cosine, as a fraction of `lr`."""
    rope: RopeChoice | None = None
    """RoPE of this phase, made from the model's own; none takes the schedule's `rope`, and without
    one keeps that of the phase before, in the first phase the model's own."""
    rope_to: Length | None = None
    """Length the RoPE is made for, not below `length` and `position_span`; unless given the larger
    of these."""
    position_span: Length | None = None
    """Positions of a row skip ahead at random places, so that rows of `length` tokens reach
    positions and distances up to this, at the cost of `length`; rows with `rope: native` or
    `distill` do not."""
    position_pieces: Annotated[int, Field(ge=2)] | None = None
    """Pieces of a row, of random sizes, between which positions skip; 2 unless given."""
    mix: Mix | None = None
    """Name of a source, or its place in `data` from 0 on, to its share of this phase's rows;
    sources that are not named give none. Without a mix the sources' own weights hold."""

    @model_validator(mode="after")
    def _rope_for_the_rows(self) -> "Phase":
        if self.rope_to is not None and self.rope_to < self.length:
            raise ValueError(f"rope_to is {self.rope_to} but rows have {self.length} tokens; give "
                             "at least that, or leave it out")
        if self.rope_to is not None and self.rope_to < (self.position_span or 0):
            raise ValueError(f"rope_to is {self.rope_to} but positions reach {self.position_span}; "
                             "give at least that, or leave it out")
        return self

    @model_validator(mode="after")
    def _positions_skip(self) -> "Phase":
        if self.position_span is None and self.position_pieces is not None:
            raise ValueError(f"position_pieces is {self.position_pieces} but there is no "
                             "position_span that says how far positions skip; give it too")
        if self.position_span is not None and self.position_span <= self.length:
            raise ValueError(f"position_span is {self.position_span}, but rows have {self.length} "
                             "tokens, which reach as far; give more, or leave it out")
        if (self.position_pieces or 2) > self.length:
            raise ValueError(f"position_pieces is {self.position_pieces}, but rows have "
                             f"{self.length} tokens; give at most that")
        return self

    @property
    def reach(self) -> int:
        """The length that its RoPE is made for."""
        return self.rope_to or self.position_span or self.length

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

    model: ModelPath
    schedule: Annotated[list[Phase], Field(min_length=1)]
    """Phases of growing length."""
    rope: RopeChoice | None = None
    """RoPE of each phase that has none of its own, made from the model's own for the longest length
    so far (`rope_to` or `length`). A phase within the native length keeps the model's own."""
    data: Annotated[list[DataSource], Field(min_length=1)]
    teacher: ModelPath | None = None
    """Of rows with `distill`; unless given, the model that the run begins with. Give the one before
    where that was rescaled already. It has the same tokens."""
    token_cache: str | None = None
    """Directory that keeps the tokens of text for other runs; unless given, `$EXTEND_CACHE/tokens`
    or `extend/tokens` in the user's cache home."""
    mode: Literal["full", "lora"] = "full"
    lora_rank: Annotated[int, Field(ge=1)] = 32
    lora_alpha: Annotated[Number, Field(gt=0)] | None = None
    """Adapters count lora_alpha / lora_rank times; lora_rank unless given."""
    trainable: list[str] = []
    """Regular expressions; only parameters whose name one of them matches are trained. With mode
    lora they choose the linear layers, by the names of their weights, that get an adapter."""
    trained_beside: list[str] = []
    """With mode lora: what is trained whole beside the adapters. `norms`, `embeddings`, or regular
    expressions for the names of parameters."""
    answer_weight: Annotated[Number, Field(ge=0)] = 0.0
    """Adds this times the mean loss over answer tokens to the mean over all tokens."""
    layout: Literal["contiguous", "zigzag", "striped"] = "zigzag"
    kernel: str = "auto"
    strategy: Annotated[str, BeforeValidator(parse_strategy)] = "auto"
    """How attention over a row that several processes share is computed; auto is the fastest that
    fits in memory, `usp:N` splits heads over N processes, `double-ring:N` takes them for N hosts.
    """
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes, of one host, that compute the same tokens, each with its share of heads, channels
    of the MLP and vocabulary. It divides their numbers."""
    shard_over: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """So many processes, neighbours beside tensor_parallel, share parameters, gradients and the
    optimizer's state between them; the others hold replicas. all: no replicas."""
    document_mask: bool = True
    """Tokens see only their own of the documents that are packed into one row."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimizer updates. What is not trained has `compute_dtype`."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype that layers compute in, and into which weights are gathered. auto: bfloat16 on CUDA or
    where `weight_dtype` is, float32 else."""
    linear_dtype: Literal["compute", "float8", "float8-rowwise"] = "compute"
    """float8: linear layers multiply in 8 bits, with one scale a tensor, or one a row, through
    torchao; weights, attention and the output head stay in `compute_dtype`."""
    export_dtype: FloatDtype | None = None
    """Dtype of the written checkpoint; that of the input unless given."""
    recomputed_layers: Literal["auto", "all"] | Annotated[int, Field(ge=0)] = "auto"
    """So many layers, from the first on, keep their input only and are computed again for their
    backward; the others keep all they need. auto: as few as the device's memory allows."""
    kept_attention: Literal["all"] | Annotated[int, Field(ge=0)] = "all"
    """In so many of the recomputed layers, from the first on, attention is not computed again: its
    output, as large as the layer's input, is kept too."""
    host_memory: Bytes = 0
    """Of all processes of a host together: what layers keep goes there, as far as it fits, while
    others compute; the rest stays on the device. A number of bytes, or text such as 180GiB."""
    kept_form: Literal["exact", "fp8"] = "exact"
    """fp8: layers keep their inputs in 8 bits, with a relative error of 2.6 %."""
    tile_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """MLPs and norms work on so many tokens at a time; auto: 16384, where a process has more than
    65536 tokens of a row; none: on all."""
    compile: bool | Literal["auto"] = "auto"
    """Norms, MLPs and projections through torch.compile; auto: on GPUs."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-offload"] = "adamw"
    """adamw-8bit: moments in 8 bits, through torchao. adamw-offload: weights, gradients and moments
    are in host memory, and updated there; layers' weights come to the device when they are due."""
    stochastic_rounding: bool = False
    """With weight_dtype bfloat16 and adamw-8bit: weights are rounded up or down by chance, so that
    small updates are not lost."""
    betas: tuple[Number, Number] = (0.9, 0.95)
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    clip_norm: Annotated[Number, Field(gt=0)] = 1.0
    bad_loss: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite or has exploded: stop and name
    its rows, or leave the weights as they are and go on."""
    max_loss_rise: Annotated[Number, Field(gt=0)] | None = 5.0
    """A loss so many nats a token above the median of the last 32 steps of the phase has exploded;
    none: only one that is not finite is bad."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 10
    """With bad_loss skip: after so many in a run the next bad step stops it."""
    loss_chunk: Annotated[int, Field(ge=1)] = 4096
    """Tokens whose logits exist at once."""
    save_every: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Told of every step beside metrics.jsonl; they need `extend-context[trackers]`."""
    project: str | None = None
    """Of the run in trackers; the name of the directory that holds the output unless given."""
    run_name: str | None = None
    """In trackers; the name of the output's directory unless given."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 1
    """The last so many stay until the run is done."""
    save_in_background: bool = False
    """Checkpoints are copied to memory of the host, as large as they are, and written while
    training goes on."""
    nproc: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes; auto is one per visible GPU, or one."""
    restarts: Annotated[int, Field(ge=0)] = 0
    """So often the processes are started again from the last checkpoint when one of them was
    killed, hangs, or fails in a way that is not told as an error of the run."""
    seed: int = 0

    @property
    def distills(self) -> bool:
        """Whether any source teaches what the model that the run begins with predicts."""
        return any(data.distill for data in self.data)

    @model_validator(mode="after")
    def _growing(self) -> "TrainOptions":
        lengths = [phase.length for phase in self.schedule]
        if lengths != sorted(lengths):
            raise ValueError(f"schedule: lengths must not shrink, they are {lengths}")
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> "TrainOptions":
        check_sources(self.data, self.document_mask)
        for number, phase in enumerate(self.schedule):
            try:
                source_weights(self.data, phase.mix)
            except ValueError as error:
                raise ValueError(f"schedule: mix of phase {number + 1}: {error}") from None
        return self

    @model_validator(mode="after")
    def _teacher_has_rows(self) -> "TrainOptions":
        if self.teacher is not None and not self.distills:
            raise ValueError(f"teacher is {self.teacher}, but no source of data says distill; "
                             "leave it out, or say which rows it teaches")
        return self

    @model_validator(mode="after")
    def _rope_to_has_a_rope(self) -> "TrainOptions":
        """Otherwise the written length would grow without any change of the RoPE."""
        for phase in self.schedule:
            if phase.rope_to is not None and phase.rope is None and self.rope is None:
                raise ValueError(f"schedule: rope_to is {phase.rope_to} but no rope says how it "
                                 "is made; give rope, there or for all phases, or leave it out")
        return self

    @model_validator(mode="after")
    def _whole_parameters_beside_adapters(self) -> "TrainOptions":
        if self.mode != "lora" and (self.trained_beside or self.lora_alpha is not None):
            key = "trained_beside" if self.trained_beside else "lora_alpha"
            raise ValueError(f"{key} is for mode lora, but mode is {self.mode}; leave it out, or "
                             "set mode lora")
        return self

    @model_validator(mode="after")
    def _dtypes_that_go_together(self) -> "TrainOptions":
        if self.weight_dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError("weight_dtype is bfloat16 but compute_dtype is float32; layers cannot "
                             "compute in more bits than weights have; set weight_dtype float32")
        if self.stochastic_rounding and (self.weight_dtype, self.optimizer) != ("bfloat16",
                                                                                "adamw-8bit"):
            raise ValueError("stochastic_rounding needs weight_dtype bfloat16 and optimizer "
                             f"adamw-8bit, which are {self.weight_dtype} and {self.optimizer}")
        return self
