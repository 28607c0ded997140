"""What a run needs in one process, checked and put together."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extend.checkpoint import Checkpoint
from extend.documents import list_files
from extend.errors import RecipeError
from extend.manifest import Manifest
from extend.model_config import ModelConfig, RopeSpec, read_config
from extend.ring.hf_attention import RingSettings
from extend.rope.live import RotaryModules, make_rotary, place_rotary
from extend.rope.schedule import Stage, composition_warnings, schedule_ropes
from extend.tokenizer import load_tokenizer
from extend.train.bad_steps import LossHistory
from extend.train.batch import Batch, Taught
from extend.train.compiled import compiles
from extend.train.data import ROWS_FORMAT, Rows, load_rows
from extend.train.equality import check_equal
from extend.train.export import Exporter
from extend.train.loss import Teacher
from extend.train.low_bits import check_low_bits
from extend.train.memory import LayerMemory
from extend.train.mesh import (
    PhaseMesh,
    Processes,
    check_attention,
    check_schedule,
    check_world,
    split_phase,
)
from extend.train.model import CausalLoss, build_model, check_rope
from extend.train.optim import build_optimizer, tell_lost_updates
from extend.train.precision import compute_dtype
from extend.train.recompute import save_memory
from extend.train.shard import shard_model
from extend.train.size import ModelSize, model_size
from extend.train.state import RunState
from extend.train.teacher import check_teacher, load_teacher, teacher_config
from extend.train.tensor_parallel import check_tensor_parallel
from extend.train.token_cache import TokenCache, default_directory
from extend.train.trained import init_adapters, trained_parameters
from extend.train.weights import fill_weights
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)

# They decide where and when the work is done, not what comes out of it; or, of a step that went
# wrong, what is to be done now.
_NOT_RECORDED = {"nproc", "save_every", "keep_checkpoints", "save_in_background", "model",
                 "teacher", "host_memory", "kept_attention", "token_cache", "trackers", "project",
                 "run_name", "shard_over", "tensor_parallel", "restarts", "bad_loss",
                 "max_loss_rise", "max_skipped_steps"}


@dataclass
class Run:
    """A run in one process.

    Attributes:
        ropes: of every phase.
        teacher: the model that rows are distilled from, if any are.
        memory: what layers keep until their backward; None: all that autograd saves.
        manifest: in the main process only.
        first_step: steps that a checkpoint holds already.
        history: of the losses so far.
    """

    options: TrainOptions
    processes: Processes
    config: ModelConfig
    ropes: list[RopeSpec]
    rows: Rows
    module: CausalLoss
    teacher: CausalLoss | None
    memory: LayerMemory | None
    optimizer: torch.optim.Optimizer
    size: ModelSize
    exporter: Exporter
    state: RunState
    manifest: Manifest | None
    first_step: int
    history: LossHistory
    _rotary: dict[bool, RotaryModules] = field(default_factory=dict)

    def set_phase_rope(self, number: int) -> None:
        """Make the RoPE of a phase, and the model's own if rows need it; put in the former."""
        phase, own = self.options.schedule[number], self.config.max_position_embeddings
        wanted = {False: (self.ropes[number], phase.length)}
        if any(source.kind.native_rope for source in self.rows.sources):
            wanted[True] = (self.config.rope, own)
        self._rotary = {native: make_rotary(self.module.model, self.config.raw, rope, length,
                                            self.processes.device)
                        for native, (rope, length) in wanted.items()}
        self.use_rope(native=False)

    def use_rope(self, *, native: bool) -> None:
        """Read what follows with the model's own RoPE, or with that of the phase."""
        place_rotary(self._rotary[native])

    def forward(self, mesh: PhaseMesh, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss of a batch, and the cross-entropy of each of its tokens."""
        ring = RingSettings(mesh.ring, self.options.layout, self.options.kernel,
                            self.options.strategy, batch.cu_seqlens, self.memory)
        taught = None if batch.taught is None else self._teach(batch.taught, ring)
        if not batch.kind.distill:
            taught = None
        self.use_rope(native=batch.kind.native_rope)
        return self.module(batch.input_ids, batch.position_ids, batch.labels, weights, ring, taught)

    @torch.no_grad()
    def _teach(self, read: Taught, ring: RingSettings) -> Teacher:
        """What the teacher makes of a batch, with its own RoPE."""
        return Teacher(*self.teacher(read.input_ids, read.position_ids, None, None,
                                     replace(ring, keeper=None, cu_seqlens=read.cu_seqlens)))


def plan_ropes(options: TrainOptions, world: int) -> list[RopeSpec]:
    """Check all that needs no weights, and return the RoPE of every phase.

    Raises:
        LayoutError, DataError, CheckpointError, CompatibilityError, RecipeError, TrainingError: as
            `train`.
    """
    check_world(options, world)
    check_schedule(options.schedule, options.layout, world, options.tensor_parallel)
    for data in options.data:
        if data.path is not None:
            list_files(data.path)
            _require_outside(token_directory(options), data.path)
    Checkpoint(options.model)
    config = read_config(options.model)
    check_tensor_parallel(options, config)
    check_attention(options, config.num_heads, world)
    check_low_bits(options, compute_dtype(options), world)
    check_teacher(options, config)
    ropes = schedule_ropes(config.rope, rope_stages(options, config.rope))
    for phase, rope in zip(options.schedule, ropes):
        check_rope(rope, split_phase(phase, world, options.tensor_parallel)[1])
    return ropes


def rope_stages(options: TrainOptions, native: RopeSpec) -> list[Stage | None]:
    """The RoPE that each phase asks for: its own, the schedule's, or None to keep the last one."""
    stages, longest = [], 0
    for phase in options.schedule:
        target = phase.reach
        longest = max(longest, target)
        if phase.rope is not None:
            stages.append(Stage(target, phase.rope.method, phase.rope.options))
        elif options.rope is not None and longest > native.original_len:
            stages.append(Stage(longest, options.rope.method, options.rope.options))
        else:
            stages.append(None)
    return stages


def prepare(options: TrainOptions, state: RunState) -> Run:
    """Read data and model, sharded, and go back to the last checkpoint if there is one."""
    processes, config = state.processes, read_config(options.model)
    ropes = plan_ropes(options, processes.world)
    manifest = _start_manifest(options) if processes.is_main else None
    if manifest is not None:
        state.check(_fingerprint(manifest, options, processes))
    hashes = processes.share(_hash_data(options, manifest))
    with start_rows(options, config, state, hashes) as rows:
        return _put_together(options, config, ropes, state, manifest, rows)


@contextmanager
def start_rows(options: TrainOptions, config: ModelConfig, state: RunState,
               hashes: Mapping[str, str]) -> Iterator["Future[Rows]"]:
    """Tokenise in the background what the cache does not hold, until the block is left."""
    # Where the cache cannot be written, tokens go where the run's checkpoints do.
    cache = TokenCache([token_directory(options), state.directory / "tokens"], hashes,
                       is_main=state.processes.is_main)
    tokenizer = load_tokenizer(options.model)
    with ThreadPoolExecutor(1, "rows") as pool:
        try:
            yield pool.submit(load_rows, options, tokenizer, cache, native_length(config),
                              native_length(teacher_config(options, config)))
        finally:
            cache.stopped.set()


def token_directory(options: TrainOptions) -> Path:
    """Where tokens are kept."""
    return Path(options.token_cache).expanduser() if options.token_cache else default_directory()


def _require_outside(cache: Path, data: str) -> None:
    """Files that a run adds to its data would make them other data at the next start."""
    if cache.resolve().is_relative_to(Path(data).resolve()):
        raise RecipeError(f"token_cache {cache} lies in the data {data}, which would not be the "
                          "same after it is written; choose another directory")


def native_length(config: ModelConfig) -> int:
    """Tokens up to which a model reads with one and the same RoPE, its own."""
    rope = config.rope
    return rope.original_len if rope.depends_on_length else config.max_position_embeddings


def _put_together(options: TrainOptions, config: ModelConfig, ropes: list[RopeSpec],
                  state: RunState, manifest: Manifest | None, rows: "Future[Rows]") -> Run:
    processes = state.processes
    model, source = build_model(options, config), Checkpoint(options.model)
    exporter = Exporter(source, model, options.export_dtype)
    size = model_size(model, config)
    if processes.is_main:
        _tell_windows(options, size)
        _tell_ropes(options, config)
        tell_lost_updates(options)
    memory = save_memory(model, options, config, processes)
    loss = CausalLoss(model, options.loss_chunk, compiled=compiles(options, processes.device))
    module = shard_model(loss, processes, options)
    fill_weights(model, source)
    init_adapters(model, options.seed)
    check_equal(trained_parameters(module), processes)
    teacher = load_teacher(options, config, processes) if options.distills else None
    optimizer = build_optimizer(trained_parameters(module).values(), options)
    found = rows.result()
    if manifest is not None:  # only now, so that bad data or a bad model leaves nothing behind
        state.open(_fingerprint(manifest, options, processes))
    processes.barrier()
    step = state.load_newest(module, optimizer)
    if step and processes.is_main:
        logger.info("going on after step %d of %s", step, state.directory)
    lines = state.metrics_lines() if processes.is_main and step else []
    return Run(options, processes, config, ropes, found, module, teacher, memory, optimizer, size,
               exporter, state, manifest, step, LossHistory.read(processes.share(lines), step))


def _tell_ropes(options: TrainOptions, config: ModelConfig) -> None:
    """Say so when a schedule does not compose, or rows outgrow the RoPE that they are read with."""
    stages = rope_stages(options, config.rope)
    for warning in composition_warnings(config.rope, stages):
        logger.warning("%s: %s", options.model, warning)
    made_for = config.max_position_embeddings
    for phase, stage in zip(options.schedule, stages):
        made_for = made_for if stage is None else stage.target_len
        longest = phase.position_span or phase.length
        if longest > made_for:
            logger.warning("%s: rows of %d tokens are longer than the %d that their RoPE is made "
                           "for; 'rope: auto' makes one for each length", options.model,
                           longest, made_for)


def _tell_windows(options: TrainOptions, size: ModelSize) -> None:
    """Say so when layers cannot see as far as the rows are long: training does not change that."""
    longest = options.schedule[-1].length
    short = [window for window in size.windows if window is not None and window < longest]
    if short:
        logger.warning("%d of %d layers of %s see a sliding window of %d tokens, not all %d of a "
                       "row; rescale with sliding_window 'drop' for full attention", len(short),
                       len(size.windows), options.model, min(short), longest)


def _start_manifest(options: TrainOptions) -> Manifest:
    """Hash the inputs. What is read counts by its content, so paths are left out of the options."""
    inputs = {"model": options.model}
    if options.teacher is not None:
        inputs["teacher"] = options.teacher
    settings = options.model_dump(mode="json", exclude=_NOT_RECORDED)
    for i, data in enumerate(settings["data"]):
        path = data.pop("path")
        data["has_path"] = path is not None
        if path is not None:
            inputs[f"data[{i}]"] = path
    return Manifest("train", inputs, settings, options.seed)


def _hash_data(options: TrainOptions, manifest: Manifest | None) -> dict[str, str]:
    """Path of every source -> hash of its content; none outside the main process."""
    if manifest is None:
        return {}
    return {data.path: manifest.record["inputs"][f"data[{i}]"]["sha256"]
            for i, data in enumerate(options.data) if data.path is not None}


def _fingerprint(manifest: Manifest, options: TrainOptions,
                 processes: Processes) -> dict[str, Any]:
    """What the run is; its `options` and `inputs` must be the same for a run to go on.

    `read_fingerprint` makes options of it again. Moments in 8 bits have one scale for each 256 of a
    shard, so they fit the same shards only.
    """
    settled = dict(manifest.record["options"]) | {"format of rows": ROWS_FORMAT}
    if options.optimizer == "adamw-8bit":
        settled["processes with adamw-8bit"] = processes.world
    hashes = {role: entry["sha256"] for role, entry in manifest.record["inputs"].items()}
    return {"processes": processes.world, "options": settled, "inputs": hashes,
            "model": str(Path(options.model).absolute()),
            "data": [data.path for data in options.data]}


def read_fingerprint(record: Mapping[str, Any]) -> TrainOptions:
    """The options of a run; those that decide nothing of what comes out of it are the defaults.

    Raises:
        KeyError, TypeError, pydantic.ValidationError: a record that is none, or of other options.
    """
    settings = {key: value for key, value in record["options"].items()
                if key in TrainOptions.model_fields}
    settings["data"] = [{key: value for key, value in data.items() if key != "has_path"}
                        | {"path": path} for data, path in zip(settings["data"], record["data"])]
    return TrainOptions(**settings | {"model": record["model"]})
