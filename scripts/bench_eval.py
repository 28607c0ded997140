#!/usr/bin/env python3
"""Time evaluation: a streamed grid against cell by cell, a long prefill, and building prompts.

    python scripts/bench_eval.py --model data/smollm2-135m-instruct --out runs/bench-eval
    python scripts/bench_eval.py --model DIR --sections grid --grid-seconds 120
    python scripts/bench_eval.py --model DIR --tiny            # small sizes, for a CPU

Sections:

grid      the passkey grid of 10 lengths, equally spaced to --longest, and 10 depths: by
          passkey-stream (all cells in one row) and by passkey (a row a cell), both from building
          prompts to finished rows. Every cell is timed unless that takes longer than
          --grid-seconds; then whole rounds over the lengths are timed and scaled, and the result
          says so. Also the greatest difference between answers of the stream and of one forward of
          the same prompt, and where the stream's time goes. Goal: 1/20.
prefill   one row of --prefill tokens, and the kernels of its attention alone in the same parts, on
          tensors of the same shapes, for all layers. Goal: 1.3 times as long.
prompts   one prompt of --prefill tokens of each task that is asked at given lengths, from a fresh
          task (text is read and tokenised anew), on one core. Goal: 10 s.
generate  --rows prompts of each of up to 6 lengths, halved from --longest, 64 new tokens each.
          Not in the default.

A --model without weights (config.json and a tokenizer alone) is run with random ones: times do not
depend on them. Hidden text comes from --text or is made up. Writes bench.json and table.md into
--out after every section and prints the table.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from eval_bench.table import table

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("grid", "prefill", "prompts", "generate")
TINY = {"longest": 3200, "lengths": 4, "depths": 3, "prefill": 2048, "chunk": 512, "rows": 2,
        "prompt_seconds": 20.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "data" / "smollm2-135m-instruct",
        help="directory with config.json, a tokenizer, and weights or not")  # fmt: skip
    add("--sections", default="grid,prefill,prompts")
    add("--out", type=Path, default=Path("runs/bench-eval"))
    add("--longest", type=int, default=131072, help="tokens of the longest cell")
    add("--lengths", type=int, default=10, help="how many lengths")
    add("--depths", type=int, default=10)
    add("--grid-seconds", type=float, default=600, help="for the grid cell by cell")
    add("--prefill", type=int, default=2**20, help="tokens of prefill and prompts")
    add("--chunk", type=int, help="most tokens in one forward; default by device")
    add("--rows", type=int, default=20, help="prompts of each length in section generate")
    add("--prompt-seconds", type=float, default=60, help="give up on a task's prompt after that")
    add("--text", type=Path, help="text to hide facts in; default: made up")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--commit", help="default: what git says")
    add("--tiny", action="store_true", help="small sizes, to try this script")
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    options.sections = options.sections.split(",")
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; choose of {','.join(SECTIONS)}")
    return options


def describe(options: argparse.Namespace, bench: Any) -> dict[str, Any]:
    import torch
    import transformers

    config = bench.backend.model.config
    return {"command": shlex.join(sys.argv), "commit": options.commit or commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "device": bench.device_name,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "model": str(options.model), "architecture": config.model_type,
            "layers": config.num_hidden_layers, "weights": bench.weights,
            "dtype": str(bench.backend.model.dtype).removeprefix("torch."),
            "chunk": bench.backend.chunk, "seed": options.seed}  # fmt: skip


def commit() -> str | None:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                               capture_output=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # prompts are built on one core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from eval_bench.bench import Bench
    from eval_bench.prompts import time_prompts

    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    result = describe(options, bench)
    for section in SECTIONS:
        if section not in options.sections:
            continue
        print(f"{section} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        run = time_prompts if section == "prompts" else getattr(Bench, section)
        result[section] = run(bench)
        result[section]["section_seconds"] = round(time.monotonic() - start, 2)
        (options.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "table.md").write_text(table(result))
    print(table(result))
    print(options.out / "bench.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
