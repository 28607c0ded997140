#!/usr/bin/env python3
"""Compare the planner's memory and seconds with what scripts/bench_train.py measured.

    scripts/check_plan.py docs/results/train/*.json
    scripts/check_plan.py old.json --auto ulysses      # what strategy auto took when it ran

One line a configuration, and the worst errors. Exits with 1 where memory is off by more than 5 % or
seconds by more than 10 %. Rows of an error, such as out of memory, must not be said to fit. Of a
first step (--steps 0) seconds are shown but not held against the plan: code is compiled and host
memory pinned in it; and up to schema 2 moments did not exist yet. Up to schema 3 compiled layers
that were not computed again saved more than today: memory of such rows is shown alone, as is that
of rows that say how today's code differs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, not installed

from extend.capacity import (  # noqa: E402
    GIB,
    GPUS,
    Machine,
    Setup,
    model_shape,
    plan_memory,
    plan_time,
)
from extend.capacity.recompute import USABLE_FRAC  # noqa: E402
from extend.capacity.setup import auto_tile  # noqa: E402
from extend.model_config import parse_config  # noqa: E402

MOST = {"memory": 0.05, "seconds": 0.10}
# Files of schema 1 have no settings: all layers computed again, in plain PyTorch.
FIRST = {"recomputed": "all", "compile": "no", "kept": "all", "host_memory": 0, "form": "exact",
         "tile": "auto", "trained": "all", "strategy": "auto", "kernel": "cudnn"}


def read(file: Path) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Every row of a file with its settings, the number of GPUs and their kind."""
    data = json.loads(file.read_text(encoding="utf-8"))
    world, gpu = int(data["gpu"].split()[0]), data["gpu"].lower()
    kind = next((name for name in GPUS if name in gpu), None)
    if kind is None:
        raise SystemExit(f"{file}: no rates for {data['gpu']}; they are for {', '.join(GPUS)}")
    host = 100 * GIB if "--host-memory 100GiB" in data["command"] else 0
    for row in data["rows"]:
        first = FIRST | {"host_memory": host}
        whole = {"shape": "8b", "layers": data.get("layers", 32), "settings": first,
                 "schema": data["schema"]} | row
        yield whole, world, kind


def build_setup(row: dict[str, Any], world: int, auto: str) -> Setup:
    """The step that a row measured."""
    settings = row["settings"]
    tp = settings.get("tensor_parallel", 1)
    local_len = row["length"] // (world // tp)
    tile = {"auto": auto_tile(local_len), "none": None}.get(settings["tile"])
    if str(settings["tile"]).isdigit():
        tile = int(settings["tile"])
    recomputed, kept = settings["recomputed"], settings["kept"]
    strategy = auto if settings["strategy"] == "auto" else settings["strategy"]
    return Setup(
        length=row["length"], cp=world // tp, tp=tp, tile=tile,
        compiled=settings["compile"] != "no",
        recomputed=10**9 if recomputed in ("all", "auto") else int(recomputed),
        kept_attention=10**9 if kept == "all" else int(kept), strategy=strategy,
        host_bytes=int(settings["host_memory"]), kept_form=settings["form"],
        trained=settings["trained"], optimizer=settings.get("optimizer", "adamw"))


def compare(row: dict[str, Any], world: int, gpu: str, auto: str) -> dict[str, float]:
    """Print one line; errors of memory and seconds as fractions."""
    from bench_train import SHAPES

    config = SHAPES[row["shape"]] | {
        "model_type": "llama", "num_hidden_layers": row["layers"], "rope_theta": 1e4,
        "max_position_embeddings": 1 << 20}
    shape = model_shape(parse_config(config, Path(row["shape"])))
    setup = build_setup(row, world, auto)
    settings = row["settings"]
    what = (f"{world} x {gpu} {row['shape']} {row['layers']:>2} {row['length']:>9,} recomputed "
            f"{settings['recomputed']:>3}, kept {settings['kept']}, compile {settings['compile']}, "
            f"{setup.strategy} {settings['kernel']}, {settings['trained']}")
    memory = plan_memory(shape, setup)
    is_first = row.get("seconds") == row.get("first_seconds", 0)
    lacking = is_first and row["schema"] <= 2
    needed = memory.device_bytes + memory.outside_bytes
    if "error" in row:
        fits = needed <= USABLE_FRAC * GPUS[gpu].memory_gib * GIB
        print(f"{what}: ran out of memory, planned {needed / GIB:.1f} GiB")
        return {"said to fit": 1.0 if fits else 0.0}
    machine = Machine(gpu=gpu, num_gpus=world)
    kernel = settings["kernel"]
    time = plan_time(shape, setup, machine, GPUS[gpu], kernel)
    planned = memory.device_bytes
    if lacking:  # until the update; and then gradients and moments are made
        planned = max(part.total - (part.name != "update") * part.parts["optimizer"]
                      for part in memory.moments)
    errors = {"memory": planned / GIB / row["peak_gib"] - 1,
              "seconds": time.seconds / row["seconds"] - 1}
    print(f"{what}: {planned / GIB:6.2f} of {row['peak_gib']:6.2f} GiB "
          f"({errors['memory']:+.1%}), {time.seconds:6.2f} of {row['seconds']:6.2f} s "
          f"({errors['seconds']:+.1%}{', a first step' * is_first})")
    if is_first:
        del errors["seconds"]
    saved_more = row["schema"] <= 3 and (
        setup.compiled and setup.used_tile is None and setup.recomputed < row["layers"])
    if saved_more or "differs" in row:
        print(f"    memory not compared: {row.get('differs', 'its layers saved more')}")
        del errors["memory"]
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--auto", default="ring", help="the strategy that auto stood for")
    args = parser.parse_args()
    found = [compare(row, world, gpu, args.auto)
             for file in args.files for row, world, gpu in read(file)]
    failed = any(errors.get("said to fit") for errors in found)
    for name, most in MOST.items():
        sizes = [abs(errors[name]) for errors in found if name in errors]
        if sizes:
            print(f"{name}: worst {max(sizes):.1%}, mean {sum(sizes) / len(sizes):.1%} over "
                  f"{len(sizes)} configurations (at most {most:.0%} wanted)")
            failed |= max(sizes) > most
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
