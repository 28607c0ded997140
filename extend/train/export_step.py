"""A step of a run that is not done, as an HF checkpoint: `export`.

Needs one process, no GPU, and memory for one tensor: what was trained is read from the training
state tensor by tensor, and everything else from the model that the run started from.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from extend.checkpoint import Checkpoint, copy_side_files
from extend.errors import CheckpointError, CompatibilityError
from extend.inputs import takes_models
from extend.manifest import METRICS_NAME, Manifest
from extend.model_config import read_config, read_json
from extend.output import (
    atomic_directory,
    require_apart,
    require_inputs_outside,
    require_new,
    write_json,
)
from extend.rope.schedule import schedule_ropes
from extend.train.export import Exporter, made_for
from extend.train.gather import Gather
from extend.train.mesh import Processes
from extend.train.model import CausalLoss, build_model
from extend.train.session import read_fingerprint, rope_stages
from extend.train.sound import find_damage
from extend.train.state import (
    RUN_FILE,
    describe_cause,
    quiet_alone,
    saved_steps,
    step_directory,
)
from extend.train_options import Phase, TrainOptions

logger = logging.getLogger(__name__)


@takes_models("model")
def export_step(state: Path | str, out: Path | str, *, model: Path | str | None = None,
                dtype: str | None = None, overwrite: bool = False) -> Path:
    """Write what a run had trained after some step as a checkpoint that loads everywhere.

    It has the RoPE of the phase that the step belongs to. The run can go on as before.

    Args:
        state: `<out>.state/step-N` of the run, or `<out>.state` for the newest step.
        out: directory to create.
        model: the model that the run started from, if it is not where it was.
        dtype: of the floating-point tensors; the run's `export_dtype` by default.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        CheckpointError: `state` holds no complete step, is damaged, or `out` cannot be written.
        CompatibilityError: `model` is not the one that the run started from.
        RecipeError: `out` lies in `state`, or would replace an input.
    """
    step_dir, out = _find_step(Path(state).absolute()), Path(out).absolute()
    record = read_json(step_dir.parent / RUN_FILE)
    options = _read_options(record, step_dir.parent, {} if model is None else {"model": str(model)})
    inputs = {"model": options.model, "state": step_dir}
    require_inputs_outside(out, inputs)
    require_apart(out, {"state": step_dir.parent})  # it goes when the run is done
    require_new(out, overwrite=overwrite)
    step = int(step_dir.name.rpartition("-")[2])
    dtype = dtype or options.export_dtype
    manifest = Manifest("export", inputs, {"step": step, "dtype": dtype})
    source, config = Checkpoint(options.model), read_config(options.model)
    _check_model(manifest, record, options.model)
    phases = _phases_until(options.schedule, step)
    rope = schedule_ropes(config.rope, rope_stages(options, config.rope))[len(phases) - 1]
    trained, max_len = build_model(options, config), made_for(phases, config)
    exporter = Exporter(source, trained, dtype)
    alone = Processes(0, 1, torch.device("cpu"), None)
    if (damage := find_damage(step_dir, alone)) is not None:
        raise CheckpointError(f"{step_dir}: the training state is damaged: {damage}; export "
                              "another step")
    whole = _read_from(step_dir, CausalLoss(trained, options.loss_chunk))
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        exporter.write(partial, alone, whole)
        write_json(partial / "config.json", exporter.config(config, rope, max_len))
        copy_side_files(Path(options.model), partial, max_len=max_len)
        _copy_metrics(step_dir.parent, partial, step)
        manifest.write(partial, step=step, rope_before=config.rope.to_json(),
                       rope_after=rope.to_json(), max_position_embeddings=max_len)
    logger.info("wrote %s", out)
    return out


def _find_step(path: Path) -> Path:
    """The directory of a complete step: `path`, or the newest in it."""
    if (path / RUN_FILE).is_file():
        steps = saved_steps(path)
        if not steps:
            raise CheckpointError(f"{path}: the run has saved no step yet; see save_every")
        return step_directory(path, max(steps))
    if path.parent.joinpath(RUN_FILE).is_file():
        known = sorted(saved_steps(path.parent))
        if path in [step_directory(path.parent, step) for step in known]:
            return path
        names = ", ".join(f"step-{step}" for step in known) or "none"
        raise CheckpointError(f"{path}: no such step; the run has saved {names}")
    raise CheckpointError(f"{path}: no training state; give <out>.state/step-N of a run that is "
                          "not done")


def _read_options(record: dict[str, Any], state: Path, changes: dict[str, Any]) -> TrainOptions:
    try:
        return read_fingerprint(record | changes)
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise CheckpointError(f"{state / RUN_FILE}: does not say how the run was set up "
                              f"({type(error).__name__}); another version of extend wrote it, use "
                              "that one") from None


def _check_model(manifest: Manifest, record: dict[str, Any], model: str) -> None:
    known = record["inputs"].get("model")
    found = manifest.record["inputs"]["model"]["sha256"]
    if found != known:
        raise CompatibilityError(f"{model}: is not the model that the run started from (sha256 "
                                 f"{found[:12]}, not {str(known)[:12]}); give that one as --model")


def _phases_until(schedule: list[Phase], step: int) -> list[Phase]:
    """The phases up to the one that `step` (from 1) belongs to."""
    done = 0
    for number, phase in enumerate(schedule, start=1):
        done += phase.num_steps
        if step <= done:
            return schedule[:number]
    raise CheckpointError(f"step {step} is after the end of the schedule, which has {done} steps")


def _read_from(step_dir: Path, module: nn.Module) -> Gather:
    """Read parameters of `module`, which has no values, from the training state."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def whole(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        name = names[id(parameter)]
        try:
            found = dcp.FileSystemReader(step_dir).read_metadata().state_dict_metadata
            value = torch.empty(parameter.shape, dtype=found[f"model.{name}"].properties.dtype)
            with quiet_alone():
                dcp.load({"model": {name: value}}, checkpoint_id=step_dir, no_dist=True)
        except (OSError, ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
            raise CheckpointError(f"{step_dir}: tensor {name!r} cannot be read "
                                  f"({describe_cause(error)}); export another step") from None
        return value.to(dtype)

    return whole


def _copy_metrics(state: Path, out: Path, step: int) -> None:
    """The lines of the run's metrics up to `step`."""
    lines = (state / METRICS_NAME).read_text(encoding="utf-8").splitlines()[:step]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (out / METRICS_NAME).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
