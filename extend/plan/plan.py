"""`extend plan`: what an extension would do to a model, from its config alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.capacity import CapacityPlan
from extend.errors import RecipeError
from extend.inputs import local_path
from extend.manifest import Manifest
from extend.model_config import ModelConfig, RopeSpec, parse_config, read_json
from extend.output import atomic_directory, write_json
from extend.plan.capacity import capacity_json, plan_capacity
from extend.plan.report import to_json
from extend.plan.rope import DEFAULT_METHOD, RopePlan, plan_rope
from extend.rope.rescaling import starting_rope

PLAN_NAME = "plan.json"
PLOT_NAME = "frequencies.png"


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan, and what it was made for.

    Attributes:
        config: of the model; None when only a head size was given.
        notes: what the RoPE alone does not show.
        capacity: of a training step; None where no machine was given.
    """

    rope: RopePlan
    config: ModelConfig | None
    notes: Sequence[str]
    capacity: CapacityPlan | None = None

    def to_json(self) -> dict[str, Any]:
        model = None if self.config is None else str(self.config.path)
        return {"model": model, "notes": list(self.notes), "rope": to_json(self.rope),
                **capacity_json(self.capacity)}


def plan(model: Path | str | None = None, *, target_len: int, head_dim: int | None = None,
         rope_theta: float | None = None, from_len: int | None = None,
         method: str = DEFAULT_METHOD, options: Mapping[str, Any] | None = None,
         schedule: Sequence[int] = (), machine: Mapping[str, Any] | None = None) -> Plan:
    """Compare all RoPE methods for a model, or for plain RoPE with the given numbers.

    With a machine, also choose how a step of training at that length is laid out on it.

    Args:
        model: checkpoint directory, its config.json, or a repository of the Hub; no weights are
            read.
        target_len: tokens.
        head_dim, rope_theta, from_len: rotated channels per head, theta and native length, in place
            of a model. With a model, `from_len` alone starts again from plain RoPE at that length.
        method, options, schedule: as `plan_rope`.
        machine: keywords of `plan_capacity`: gpus, gpu, gpu_memory, host_memory, hosts, and so on.

    Raises:
        RecipeError: neither a model nor the three numbers, or both; a target below the native
            length; a method, option or schedule that is not accepted.
        CheckpointError: the config cannot be read.
        CompatibilityError: a model that cannot be treated, or whose RoPE is scaled already.
    """
    if model is None:
        config, native = None, _native_of(head_dim, rope_theta, from_len)
    elif head_dim is not None or rope_theta is not None:
        raise RecipeError(f"plan: head_dim ({head_dim}) and rope_theta ({rope_theta}) take the "
                          f"place of a model, but {model} is given too; leave one of them out")
    else:
        config = _read_model(local_path(model, only="config.json"))
        native = starting_rope(config, from_len)
    rope = plan_rope(native, target_len, method=method, options=options, schedule=schedule)
    notes = [] if config is None else _notes(config, target_len)
    capacity = plan_capacity(config, target_len, **machine) if machine else None
    return Plan(rope, config, notes, capacity)


def write_plan(found: Plan, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write plan.json and frequencies.png into the directory `out` and return it.

    Raises:
        CheckpointError: `out` exists or cannot be written.
        RecipeError: `out` holds the model, which `overwrite` would destroy.
    """
    from extend.plan.plot import draw_frequencies

    inputs = {} if found.config is None else {"config": found.config.path}
    manifest = Manifest("plan", inputs, {
        "native": found.rope.native.to_json(), "target_len": found.rope.target_len,
        "method": found.rope.method, "options": dict(found.rope.options),
        "schedule": [stage.made.target_len for stage in found.rope.stages]})
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        write_json(partial / PLAN_NAME, found.to_json())
        draw_frequencies(found.rope, partial / PLOT_NAME)
        manifest.write(partial)
    return Path(out)


def _native_of(head_dim: int | None, rope_theta: float | None, from_len: int | None) -> RopeSpec:
    if head_dim is None or rope_theta is None or from_len is None:
        raise RecipeError("plan: give a model, or head_dim, rope_theta and from_len together; "
                          f"they are {head_dim}, {rope_theta} and {from_len}")
    if head_dim < 2 or head_dim % 2:
        raise RecipeError(f"plan: head_dim must be an even number of rotated channels, not "
                          f"{head_dim}")
    if not 1 < rope_theta < float("inf"):
        raise RecipeError(f"plan: rope_theta must be a finite number above 1, not {rope_theta}")
    if from_len < 1:
        raise RecipeError(f"plan: from_len must be a number of tokens, not {from_len}")
    return RopeSpec(rope_theta=float(rope_theta), rotary_dim=head_dim, original_len=from_len)


def _read_model(path: Path) -> ModelConfig:
    """A config.json by itself will do, also that of a quantized model: only its RoPE is read."""
    file = path if path.is_file() else path / "config.json"
    return parse_config(read_json(file), file)


def _notes(config: ModelConfig, target_len: int) -> list[str]:
    notes = []
    window = config.sliding_window
    if window is not None and window < target_len:
        notes.append(f"some layers see a sliding window of {window} tokens, not all {target_len}; "
                     "rescale asks whether to drop or keep it")
    for layer_type, rope in config.rope_by_layer_type.items():
        notes.append(f"{layer_type} layers keep their own RoPE (theta {rope.rope_theta:.10g})")
    return notes
