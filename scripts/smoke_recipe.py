#!/usr/bin/env python
"""Run every stage of a recipe for large models at tiny width, on the CPU with two processes.

    .venv/bin/python scripts/smoke_recipe.py recipes/llama3-8b-1m.yaml --out runs/smoke

The recipe is written again beside tiny stand-ins for its inputs: a random model of the same
architecture, siblings that differ from it a little, a long model where the recipe starts from one,
a tokenizer of bytes, made-up text. Lengths and windows are divided by one factor, phases take two
steps, and what belongs to large hardware is left out. All else (stages, methods, thetas, options)
is what the recipe says, but for published thetas that have names of their own: those are written
out, because they are for the true lengths. The models learn nothing; what is shown is that the
stages fit together.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tiny_model import save_text, save_tiny_model

from extend.option_types import parse_length
from extend.recipe_plan.known import known_config
from extend.rope import rescale
from extend.rope.presets import PRESETS

LONGEST = 8192  # tokens: what two CPU cores do in seconds
UNTRAINED_FACTOR = 32  # of a recipe that trains nothing
LONG_THETA = 2804339835  # of a long model that is an input
SHORTEST_PROMPT = 512  # bytes that a passkey prompt needs
FOR_LARGE_HARDWARE = ("host_memory", "kept_form", "tile_tokens", "weight_dtype", "trackers")
MODEL_KEYS = ("model", "base", "tuned", "target", "reference")
TEXT_KEYS = ("haystack", "text", "path")


def shrink(recipe: dict[str, Any], *, longest: int = LONGEST) -> tuple[dict[str, Any], int]:
    """The recipe at small lengths and with few steps, and what its lengths were divided by."""
    stages = recipe["stages"]
    lengths = [parse_length(phase["length"]) for stage in stages
               for phase in stage.get("schedule", [])]
    factor = max(1, max(lengths) // longest) if lengths else UNTRAINED_FACTOR
    return {**recipe, "stages": [_shrink_stage(stage, factor) for stage in stages]}, factor


def _shrink_stage(stage: dict[str, Any], factor: int) -> dict[str, Any]:
    small = {key: value for key, value in stage.items() if key not in FOR_LARGE_HARDWARE}
    for key in ("to", "from_len"):
        if key in small:
            small[key] = parse_length(small[key]) // factor
    if stage["stage"] == "train":
        preset = PRESETS.get(small.get("rope", {}).get("method", ""))
        small |= {"nproc": 2, "save_every": 1,
                  "data": [_shrink_data(data, factor) for data in stage["data"]],
                  "schedule": [_shrink_phase(phase, factor, preset)
                               for phase in stage["schedule"]]}
        if preset is not None:
            del small["rope"]
    if stage["stage"] == "eval":
        lengths = [max(parse_length(n) // factor, SHORTEST_PROMPT) for n in stage["lengths"]]
        small |= {"lengths": sorted(set(lengths)),
                  "context_parallel": min(stage.get("context_parallel", 1), 2),
                  "tasks": [_shrink_task(task) for task in stage["tasks"]]}
    if stage["stage"] == "extract":
        small["rank"] = min(stage.get("rank", 8), 8)
    return small


def _shrink_data(data: dict[str, Any], factor: int) -> dict[str, Any]:
    small = dict(data)
    if "facts" in small:
        small["facts"] = [1]  # more do not fit into short rows
    if "document_length" in small:
        small["document_length"] = parse_length(small["document_length"]) // factor
    return small


def _shrink_phase(phase: dict[str, Any], factor: int, preset: Any = None) -> dict[str, Any]:
    small = {key: value for key, value in phase.items() if key != "tokens"}
    small |= {"length": parse_length(phase["length"]) // factor, "steps": 2,
              "batch_rows": min(phase.get("batch_rows", 1), 2)}
    if preset is not None:
        small["rope"] = {"method": "theta", "options": {
            "rope_theta": preset.thetas[parse_length(phase["length"])]}}
    if "rope_to" in phase:
        small["rope_to"] = parse_length(phase["rope_to"]) // factor
    return small


def _shrink_task(task: Any) -> Any:
    task = task if isinstance(task, dict) else {"task": task}
    small = {**task, "depths": min(task.get("depths", 2), 2), "trials": 1}
    if task["task"] == "loss":
        small = {key: value for key, value in small.items() if key not in ("depths", "trials")}
        small |= {"window": 256, "max_tokens": 4096}
    return small


def make_inputs(recipe: dict[str, Any], directory: Path, factor: int) -> None:
    """Write what the recipe reads, under the names it uses, and name them so in it."""
    names = {stage["name"] for stage in recipe["stages"]}
    inputs = [found for found in _inputs(recipe["stages"])
              if not _is_output(found[0][found[1]], names)]
    start = next(known for holder, key, is_model in inputs if is_model
                 for known in [known_config(holder[key])] if known is not None)[1]
    base: Path | None = None
    for holder, key, is_model in inputs:
        path = directory / Path(holder[key]).name
        holder[key] = path.name
        if path.exists():
            continue
        if not is_model:
            save_text(path / "text.jsonl", documents=24, lines=400)
            continue
        _save_model(path, start, factor, base, extended=key == "tuned")
        base = base or path


def _is_output(value: str, names: set[str]) -> bool:
    """Whether it is a stage, or one of those that a merge into several targets is."""
    return any(value == name or value.startswith(f"{name}-") for name in names)


def _save_model(path: Path, start: Mapping[str, Any], factor: int, base: Path | None, *,
                extended: bool) -> None:
    """The model that a recipe starts from, or one that differs from it a little."""
    config: dict[str, Any] = {}
    if start.get("sliding_window"):
        config["sliding_window"] = max(8, start["sliding_window"] // factor)
    if "rope_local_base_freq" in start:
        kinds = {"sliding_attention": start["rope_local_base_freq"],
                 "full_attention": start["rope_theta"]}
        config |= {"layer_types": list(kinds), "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in kinds.items()}}
    native_len = start["max_position_embeddings"] // factor
    short = path.with_name(f".{path.name}.short") if extended else path
    save_tiny_model(short, start["model_type"], native_len=native_len, drift_from=base,
                    rope_theta=start["rope_theta"], seed=0 if base is None else 1, **config)
    if extended:
        rescale(short, path, target_len=4 * native_len, method="theta", rope_theta=LONG_THETA)


def _inputs(value: Any) -> list[tuple[Any, Any, bool]]:
    """(mapping or list, key, whether it is a model) of every value that names a model or text."""
    if isinstance(value, list):
        return [found for item in value for found in _inputs(item)]
    if not isinstance(value, dict):
        return []
    found: list[tuple[Any, Any, bool]] = []
    for key, item in value.items():
        if key in (*MODEL_KEYS, *TEXT_KEYS) and isinstance(item, str):
            found.append((value, key, key in MODEL_KEYS))
        elif key == "target":  # of several
            keys = item if isinstance(item, dict) else range(len(item))
            found += [(item, place, True) for place in keys]
        else:
            found += _inputs(item)
    return found


def write_small(recipe: Path, directory: Path, *, longest: int = LONGEST) -> Path:
    """Write the small recipe and its inputs into `directory`; return the recipe's path."""
    loaded = json.loads(json.dumps(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    small, factor = shrink(loaded, longest=longest)
    directory.mkdir(parents=True, exist_ok=True)
    make_inputs(small, directory, factor)
    path = directory / recipe.name
    path.write_text(yaml.safe_dump(small, sort_keys=False), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of the longest row")
    arguments = parser.parse_args()
    path = write_small(arguments.recipe, arguments.out / "inputs", longest=arguments.longest)
    begin = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "extend", "run", str(path), "--out",
                           str(arguments.out / "run")]).returncode
    print(f"exit code {code} after {time.monotonic() - begin:.0f} s; {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
