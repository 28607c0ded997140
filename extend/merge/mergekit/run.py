"""Run mergekit on checked models and make a checkpoint like the target's of what it writes."""

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from extend.adapter_format.peft_files import stored_dtype
from extend.adapter_format.sidecar import HEAD_NAME, tied_copy
from extend.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    copy_side_files,
    torch_dtype,
    write_checkpoint,
)
from extend.errors import CheckpointError
from extend.manifest import Manifest
from extend.merge.mergekit.check import Checked, Problems, Request, check, reference, roles
from extend.merge.mergekit.methods import BASE, TARGET
from extend.merge.preview import Preview
from extend.output import atomic_directory, require_new, require_space, write_json

log = logging.getLogger(__name__)

CONFIG_NAME = "mergekit_config.yml"
_MODULE = "mergekit.scripts.run_yaml"
_SHARD_BYTES = "1B"  # what mergekit gathers in memory before it writes; it counts bytes
_COMPUTE_BYTES = 4
_MAX_LISTED = 4


def merge_by_mergekit(request: Request, out: Path | str, *, overwrite: bool = False) -> Path:
    """Merge a target with long models by one of mergekit's methods.

    Each adapter is first added to the base, in fp32, in a temporary checkpoint beside `out`.
    mergekit then computes in fp32 and rounds once. Methods over a base (task_arithmetic, ties,
    dare_ties, della, breadcrumbs, sce, model_stock, ...) add what target and long models changed in
    the base; slerp, nearswap and arcee_fusion blend the target with one long model, and linear and
    karcher blend all of them, so that each keeps only a part of what it learned.

    The target's own weight is 1 unless option `target.weight` says otherwise. The same seed on the
    same kind of device gives the same bytes.

    Returns:
        `out`.

    Raises:
        RecipeError: an unknown method or option, or the wrong models for the method.
        CompatibilityError: mergekit is missing, or the models do not fit together; all problems
            that headers and configs show are in one message.
        CheckpointError: a file is missing or damaged, mergekit failed, or what it wrote are not the
            target's tensors, or not finite.
    """
    out, problems = Path(out).absolute(), Problems()
    checked = check(request, problems)
    if len(problems) == 1:
        raise problems[0]
    Preview(tuple(map(str, problems))).raise_if_any()
    with atomic_directory(out, overwrite=overwrite) as partial:
        manifest = Manifest("merge", _inputs(request), _recorded(request), checked.settings.seed)
        manifest.record["versions"]["mergekit"] = importlib.metadata.version("mergekit")
        head = tied_copy(checked.target.config, checked.target.files)
        scratch = partial / ".mergekit"
        scratch.mkdir()
        require_space(scratch, _scratch_bytes(request, checked))
        config = _configuration(request, checked, _make_longs(request, scratch))
        (partial / CONFIG_NAME).write_text(_origins(request) + yaml.safe_dump(
            config, sort_keys=False), "utf-8")
        device = _run(partial / CONFIG_NAME, scratch / "merged", checked.settings.seed,
                      out.with_name(f"{out.name}.mergekit.log"))
        _write_weights(partial, Checkpoint(scratch / "merged"), checked, head)
        shutil.rmtree(scratch)
        write_json(partial / "config.json", _out_config(request, checked))
        copy_side_files(request.target, partial,
                        max_len=checked.change.max_position_embeddings_after)
        manifest.write(partial, **_summary(checked, device))
    log.info("merged %d tensors by %s; context %d tokens", len(checked.written), request.method,
             checked.change.max_position_embeddings_after)
    return out


def preview_by_mergekit(request: Request, out: Path | str, *, overwrite: bool = False) -> Preview:
    """Check such a merge from headers and configs; mergekit is not run, no byte is written."""
    problems = Problems()
    checked = check(request, problems)
    problems.attempt(lambda: require_new(out, overwrite=overwrite))
    if checked is None:
        return Preview(tuple(map(str, problems)))
    parent = next(p for p in Path(out).absolute().parents if p.exists())
    problems.attempt(lambda: require_space(parent, _scratch_bytes(request, checked)))
    return Preview(tuple(map(str, problems)), tuple(checked.written), change=checked.change)


def _inputs(request: Request) -> dict[str, Path]:
    adapters = request.adapters
    names = ["adapter"] if len(adapters) == 1 else [f"adapter{i + 1}" for i in range(len(adapters))]
    found = {TARGET: request.target, BASE: request.base, "tuned": request.tuned,
             **dict(zip(names, adapters, strict=True))}
    if request.rope_from is not None:
        found["rope_from"] = request.rope_from / "config.json"
    return {role: path for role, path in found.items() if path is not None}


def _recorded(request: Request) -> dict[str, Any]:
    return {"method": request.method, "weight": list(request.weights), "dtype": request.dtype,
            "sidecar": request.sidecar, "options": dict(request.options)}


def _summary(checked: Checked, device: str) -> dict[str, Any]:
    return {"tensors": len(checked.written), "device": device,
            "rope_theta": checked.change.after["rope_theta"],
            "max_position_embeddings": checked.change.max_position_embeddings_after,
            "dropped_buffers": sorted(
                set(checked.target.files.infos) - {info.name for info in checked.written})}


def _scratch_bytes(request: Request, checked: Checked) -> int:
    """At most on the disk at once: the long model of each adapter, mergekit's output and ours."""
    written = sum(info.num_bytes for info in checked.written)
    numbers = sum(info.num_bytes // torch_dtype(info.dtype).itemsize for info in checked.written)
    return _COMPUTE_BYTES * numbers * (len(request.adapters) + 1) + written


def _make_longs(request: Request, scratch: Path) -> dict[str, Path]:
    """Role -> the checkpoint of each long model; those of adapters are written to `scratch`."""
    from extend.adapter_format.sidecar import SIDECAR_JSON
    from extend.merge.apply import merge

    made = dict(request.longs)
    for role, adapter in list(made.items())[:len(request.adapters)]:
        rope_from = None if (adapter / SIDECAR_JSON).is_file() else request.rope_from
        made[role] = merge(adapter, request.base, scratch / role, sidecar=request.sidecar,
                           dtype="float32", rope_from=rope_from)
    return made


def _configuration(request: Request, checked: Checked,
                   longs: Mapping[str, Path]) -> dict[str, Any]:
    """What mergekit is asked for; it computes in fp32 and rounds once where one dtype will do."""
    models, base = roles(request, checked.method)
    paths = {TARGET: request.target, BASE: request.base, **longs}
    dtypes = {info.dtype for info in checked.written}
    config: dict[str, Any] = {
        "merge_method": checked.method.name, "dtype": "float32",
        "out_dtype": str(torch_dtype(*dtypes)).removeprefix("torch.") if len(dtypes) == 1
        else "float32",
        "models": [{"model": reference(paths[role]),
                    "parameters": checked.settings.per_model[role]} for role in models]}
    if base is not None:
        config["base_model"] = reference(paths[base])
    if checked.settings.shared:
        config["parameters"] = checked.settings.shared
    return config


def _origins(request: Request) -> str:
    """Comments that say what the temporary checkpoints of a configuration were."""
    adapted = list(request.longs.items())[:len(request.adapters)]
    return "".join(f"# {role} was a temporary checkpoint: {request.base} with {adapter}\n"
                   for role, adapter in adapted)


def _run(config: Path, merged: Path, seed: int, log_file: Path) -> str:
    """Run mergekit and return the device that it computed on; kill it when interrupted.

    Raises:
        CheckpointError: it failed; `log_file` stays, and is gone otherwise.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [sys.executable, "-P", "-m", _MODULE, str(config), str(merged), "--device", device,
               "--random-seed", str(seed), "--out-shard-size", _SHARD_BYTES, "--quiet", "-v",
               "--no-copy-tokenizer", "--no-write-model-card"]
    # No tensor order may depend on hashes, and no path may be taken for a name on a hub.
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    log.info("running mergekit on %s; its log is %s", device, log_file)
    with log_file.open("wb") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                 stderr=subprocess.STDOUT, env=environment)
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            log_file.unlink(missing_ok=True)
            raise
    if code != 0:
        lines = log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        raise CheckpointError(f"mergekit ended with exit code {code}: {last}; its log is "
                              f"{log_file}")
    log_file.unlink()
    return device


def _write_weights(partial: Path, merged: Checkpoint, checked: Checked, head: str | None) -> None:
    """Write the merged tensors as the target holds them: names, order, dtypes and shards."""
    _check_merged(merged, checked.target.infos)

    announced = {info.name: info for info in checked.written}

    def read(name: str) -> torch.Tensor:
        dtype = torch_dtype(announced[name].dtype)
        x = merged.read(head if name == HEAD_NAME and head else name).to(dtype)
        if not bool(torch.isfinite(x).all()):
            raise CheckpointError(f"tensor {name} holds infinite or NaN values once merged as "
                                  f"{dtype}; check the inputs and the method's options, or give "
                                  "--dtype bfloat16 or float32")
        return x

    write_checkpoint(partial, checked.written, read, file_of=checked.target.files.file_of)


def _check_merged(merged: Checkpoint, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse an output of mergekit that is not the target's list of parameters."""
    wrong = [name for name, info in infos.items() if name not in merged.infos
             or merged.infos[name].shape != info.shape
             or merged.infos[name].dtype not in FLOAT_DTYPES]
    wrong += [name for name in merged.infos if name not in infos and name != HEAD_NAME]
    if wrong:
        def shown(group: Mapping[str, TensorInfo], name: str) -> str:
            return f"{group[name].dtype} {list(group[name].shape)}" if name in group else "(none)"
        lines = [f"{name} is {shown(merged.infos, name)}, not like the target's "
                 f"{shown(infos, name)}" for name in sorted(wrong)[:_MAX_LISTED]]
        raise CheckpointError(f"mergekit wrote {len(wrong)} tensors that the target does not hold "
                              f"so: {'; '.join(lines)}. Use a method of another kind, and report "
                              "the model")


def _out_config(request: Request, checked: Checked) -> dict[str, Any]:
    config = checked.change.apply(checked.target.config.raw)
    if request.dtype is not None:
        # transformers 4 reads torch_dtype, transformers 5 writes dtype and reads both.
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
            config[key] = str(stored_dtype(request.dtype)).removeprefix("torch.")
    return config
