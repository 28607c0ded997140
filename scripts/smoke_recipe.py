#!/usr/bin/env python
"""Run every stage of a recipe for large models at tiny width, on the CPU with two processes.

    .venv/bin/python scripts/smoke_recipe.py recipes/llama3-8b-1m.yaml --out runs/smoke

The recipe is written again beside tiny stand-ins for its inputs: a random model of the same
architecture, a sibling that differs from it a little, a tokenizer of bytes, made-up text. Lengths
are divided by one factor, phases take two steps, and what belongs to large hardware is left out.
All else (stages, methods, thetas, options) is what the recipe says. The models learn nothing; what
is shown is that the stages fit together.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tiny_model import save_text, save_tiny_model

from extend.option_types import parse_length

# Architecture, native length and theta of the model that a recipe starts from.
STARTS = {"llama3-8b-1m": ("llama", "8k", 5e5), "qwen3-8b-256k": ("qwen3", "32k", 1e6)}
LONGEST = 8192  # tokens: what two CPU cores do in seconds
SHORTEST_PROMPT = 512  # bytes that a passkey prompt needs
FOR_LARGE_HARDWARE = ("host_memory", "kept_form", "tile_tokens", "weight_dtype", "trackers")
MODEL_KEYS, TEXT_KEYS = ("model", "base", "tuned", "target"), ("haystack", "text", "path")


def shrink(recipe: dict[str, Any], *, longest: int = LONGEST) -> tuple[dict[str, Any], int]:
    """The recipe at small lengths and with few steps, and what its lengths were divided by."""
    stages = recipe["stages"]
    lengths = [parse_length(phase["length"]) for stage in stages
               for phase in stage.get("schedule", [])]
    factor = max(1, max(lengths) // longest)
    return {**recipe, "stages": [_shrink_stage(stage, factor) for stage in stages]}, factor


def _shrink_stage(stage: dict[str, Any], factor: int) -> dict[str, Any]:
    small = {key: value for key, value in stage.items() if key not in FOR_LARGE_HARDWARE}
    for key in ("to", "from_len"):
        if key in small:
            small[key] = parse_length(small[key]) // factor
    if stage["stage"] == "train":
        small |= {"nproc": 2, "save_every": 1,
                  "data": [{**data, "facts": [1]} if "facts" in data else data
                           for data in stage["data"]],  # more do not fit into short rows
                  "schedule": [_shrink_phase(phase, factor) for phase in stage["schedule"]]}
    if stage["stage"] == "eval":
        lengths = [max(parse_length(n) // factor, SHORTEST_PROMPT) for n in stage["lengths"]]
        small |= {"lengths": sorted(set(lengths)),
                  "context_parallel": min(stage.get("context_parallel", 1), 2),
                  "tasks": [_shrink_task(task) for task in stage["tasks"]]}
    if stage["stage"] == "extract":
        small["rank"] = min(stage.get("rank", 8), 8)
    return small


def _shrink_phase(phase: dict[str, Any], factor: int) -> dict[str, Any]:
    small = {key: value for key, value in phase.items() if key != "tokens"}
    small |= {"length": parse_length(phase["length"]) // factor, "steps": 2,
              "batch_rows": min(phase.get("batch_rows", 1), 2)}
    if "rope_to" in phase:
        small["rope_to"] = parse_length(phase["rope_to"]) // factor
    return small


def _shrink_task(task: Any) -> Any:
    if not isinstance(task, dict):
        return task
    small = {**task, "depths": min(task.get("depths", 2), 2), "trials": 1}
    if task["task"] == "loss":
        small = {key: value for key, value in small.items() if key not in ("depths", "trials")}
        small |= {"window": 256, "max_tokens": 4096}
    return small


def make_inputs(recipe: dict[str, Any], directory: Path, factor: int) -> None:
    """Write what the recipe reads, under the names it uses, and name them so in it."""
    model_type, native, theta = STARTS[recipe["name"]]
    names = {stage["name"] for stage in recipe["stages"]}
    native_len = parse_length(native) // factor
    base: Path | None = None
    for holder, key in _inputs(recipe["stages"]):
        value = holder[key]
        if value in names:
            continue
        holder[key] = Path(value).name
        path = directory / holder[key]
        if path.exists():
            continue
        if key in MODEL_KEYS:
            save_tiny_model(path, model_type, native_len=native_len, rope_theta=theta,
                            seed=0 if base is None else 1, drift_from=base)
            base = base or path
        else:
            save_text(path / "text.jsonl", documents=24, lines=400)


def _inputs(value: Any) -> list[tuple[dict[str, Any], str]]:
    """(mapping, key) of every value under it that names a model or text."""
    if isinstance(value, list):
        return [found for item in value for found in _inputs(item)]
    if not isinstance(value, dict):
        return []
    own = [(value, key) for key in (*MODEL_KEYS, *TEXT_KEYS) if isinstance(value.get(key), str)]
    return own + [found for item in value.values() for found in _inputs(item)]


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
    arguments = parser.parse_args()
    path = write_small(arguments.recipe, arguments.out / "inputs")
    begin = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "extend", "run", str(path), "--out",
                           str(arguments.out / "run")]).returncode
    print(f"exit code {code} after {time.monotonic() - begin:.0f} s; {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
