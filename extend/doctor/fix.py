"""The portable form of a checkpoint's configuration, and writing it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.doctor.decide import Decision
from extend.doctor.families import family_of, partial_default
from extend.doctor.files import FILE_NAMES, Patient
from extend.doctor.reading import FULL, ModelFiles
from extend.errors import CheckpointError
from extend.model_config import write_rope
from extend.output import atomic_directory, copy_or_link, overlap, write_json

KEPT_SUFFIX = ".before-doctor"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def portable_form(files: ModelFiles, decision: Decision) -> ModelFiles:
    """The files with one RoPE and one length in every spelling.

    Args:
        files: as they are.
        decision: what is meant.

    Raises:
        CompatibilityError: a RoPE that cannot be written for all readers of this model.
    """
    spec, length = decision.spec, decision.max_len
    config = write_rope(_without_contradictions(files.config, decision), spec, length)
    family = family_of(files.config)
    if family.theta_key != "rope_theta":
        config[family.theta_key] = spec.rope_theta
    if family.partial_key in files.config:
        config[family.partial_key] = files.config[family.partial_key]
    tokenizer, generation = dict(files.tokenizer_config), dict(files.generation_config)
    if tokenizer.get("model_max_length") is not None and tokenizer["model_max_length"] < length:
        tokenizer["model_max_length"] = length
    if generation_cap(generation, length):
        del generation["max_length"]
    return ModelFiles(config, tokenizer, generation)


def generation_cap(generation: Mapping[str, Any], length: int) -> int | None:
    """The `max_length` of a generation config when it stops generation short of `length`."""
    cap, default = generation.get("max_length"), 20
    return cap if cap is not None and cap != default and cap < length else None


def _without_contradictions(config: Mapping[str, Any], decision: Decision) -> dict[str, Any]:
    """The config without RoPE keys, but with what other layer types keep."""
    raw = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_parameters",
                                                       "rotary_pct")}
    nested = {k: v for k, v in (config.get("rope_parameters") or {}).items()
              if isinstance(v, Mapping)}
    if nested:
        raw["rope_parameters"] = {**nested, FULL: {"rope_type": "default"}}
    share = decision.partial_rotary_factor
    if decision.spec.rope_type == "proportional":  # a share of the pairs, in the scaling entry
        raw.pop("partial_rotary_factor", None)
    elif share != partial_default(config) or "partial_rotary_factor" in config:
        raw["partial_rotary_factor"] = share
    return raw


def list_changes(before: ModelFiles, after: ModelFiles) -> dict[str, str]:
    """`file: key` to `before -> after` for every key that differs."""
    changes = {}
    for name, old, new in zip(FILE_NAMES, before, after):
        for key in dict.fromkeys((*old, *new)):
            if old.get(key, _ABSENT) != new.get(key, _ABSENT):
                changes[f"{name}: {key}"] = f"{_show(old, key)} -> {_show(new, key)}"
    return changes


_ABSENT = object()


def _show(entries: Mapping[str, Any], key: str) -> str:
    if key not in entries:
        return "(absent)"
    value = entries[key]
    if isinstance(value, Mapping):
        inner = (f"{k}: {'[...]' if isinstance(v, list) else v}" for k, v in value.items())
        return "{" + ", ".join(inner) + "}"
    return "null" if value is None else str(value)


def write_in_place(patient: Patient, files: ModelFiles) -> Path:
    """Put the changed files into the directory, each by a rename; the old ones stay beside them.

    Raises:
        CheckpointError: a kept file of an earlier fix is in the way, or the disk refuses.
    """
    changed = [(patient.directory / name, new) for name, old, new
               in zip(FILE_NAMES, patient.files, files) if old != new]
    kept = [path.with_name(path.name + KEPT_SUFFIX) for path, _ in changed]
    taken = next((path for path in kept if path.exists()), None)
    if taken is not None:
        raise CheckpointError(f"{taken}: left by an earlier fix; move it away, or give --out")
    try:
        for (path, _), copy in zip(changed, kept):
            shutil.copyfile(path, copy)
        for path, new in changed:
            write_json(path, new)
    except OSError as error:
        raise CheckpointError(f"{patient.directory}: cannot be written ({error}); the files as "
                              f"they were are beside it, named *{KEPT_SUFFIX}") from error
    return patient.directory


def write_copy(patient: Patient, files: ModelFiles, out: Path, *, overwrite: bool) -> Path:
    """Write the directory to `out` with the changed files; weights are linked or copied.

    Raises:
        CheckpointError: `out` exists and `overwrite` is false, lies in the directory or holds it,
            or the disk refuses.
    """
    if overlap(patient.directory, out):
        raise CheckpointError(f"out {out} and {patient.directory} lie in one another; choose an "
                              "out of its own, or leave --out away to change the files in place")
    with atomic_directory(out, overwrite=overwrite, inputs={"model": patient.directory}) as partial:
        for path in sorted(patient.directory.iterdir()):
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            elif path.suffix in _WEIGHTS:
                copy_or_link(path, partial / path.name)
            elif not path.name.endswith(KEPT_SUFFIX):
                shutil.copyfile(path, partial / path.name)
        for name, new in zip(FILE_NAMES, files):
            if new:
                write_json(partial / name, new)
    return out
