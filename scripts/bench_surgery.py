#!/usr/bin/env python3
"""Time extraction and merging beside mergekit, PEFT and plain copying, on the same files.

    python scripts/bench_surgery.py --shape smollm2 --rounds 3 --out runs/surgery
    python scripts/bench_surgery.py --shape 1b --layers 4 --out runs/surgery
    python scripts/bench_surgery.py --shape 8b --cold --peers none --out runs/surgery   # a GPU

Makes a base, its long version and a fine-tune of that shape below --models (synthetic, bf16,
sharded), once. Then every contender runs as the command that a user would type, one after another
in each round; times are whole commands, Python's start included, and medians over rounds. Memory is
the peak of what no file backs (`anonymous`), and with mapped files (`resident`).

    read      both models through plain calls with 16 MiB buffers: the floor of an extraction
    copy      the fine-tune, likewise, with fsync: the floor of a merge
    extract   at --rank by `extend extract` and by mergekit-extract-lora, and by the noise rule
    merge     the adapter into the fine-tune by `extend merge`, PEFT and mergekit

--cold empties the page cache before every command (needs root). Writes SHAPE.json and SHAPE.md
into --out. Targets: extraction at rank 64 >= 10 times faster than mergekit on a CPU at SmolLM2's
size and >= 20 times at 1B; on one GPU <= 1.5 times the cold read of both models at 8B; a merge
<= 1.25 times the copy; memory < 3 GB; residual within 0.5 % of the best of its rank.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

from surgery_bench.measure import drop_caches, run  # noqa: E402

HERE = Path(__file__).resolve().parent / "surgery_bench"
PEERS = ("mergekit", "peft")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", required=True, help="tiny, smollm2, 1b or 8b")
    add("--layers", type=int, help="only so many layers of the shape, where peers take too long")
    add("--models", type=Path, help="where the models lie or are made; default OUT/models-SHAPE")
    add("--out", type=Path, required=True)
    add("--rank", type=int, default=64)
    add("--rounds", type=int, default=1)
    add("--threads", type=int, default=os.cpu_count(), help="of every contender")
    add("--peers", default=",".join(PEERS), help="mergekit, peft or none")
    add("--only", default="", help="contenders to run, by name and comma; all unless given")
    add("--cold", action="store_true", help="empty the page cache before every command")
    add("--every", type=int, default=7, help="accuracy: check every so-many-th module")
    add("--limit-seconds", type=float, help="stop a contender after that long")
    add("--commit", default="", help="recorded in the results; asked of git unless given")
    args = parser.parse_args(arguments)
    args.name = args.shape if args.layers is None else f"{args.shape}-{args.layers}-layers"
    args.models = args.models or args.out / f"models-{args.name}"
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def contenders(args: argparse.Namespace, device: str) -> dict[str, tuple[list[str], Path | None]]:
    """name -> (command, what it writes), in the order in which they depend on one another."""
    models, work, python = args.models, args.out / f"work-{args.name}", sys.executable
    base, tuned, target = (str(models / role) for role in ("base", "tuned", "target"))
    adapter, threads = work / "extract", str(args.threads)
    plain = [python, str(HERE / "plain_io.py")]
    ours = [python, "-m", "extend"]
    pair = ["--base", base, "--tuned", tuned]
    found: dict[str, tuple[list[str], Path | None]] = {
        "read": ([*plain, "read", "1", base, tuned], None),
        "read, all threads": ([*plain, "read", threads, base, tuned], None),
        "extract": ([*ours, "extract", *pair, "--rank", str(args.rank), "--out", str(adapter)],
                    adapter),
        "extract, noise rule": ([*ours, "extract", *pair, "--out", str(work / "noise")],
                                work / "noise"),
        "copy": ([*plain, "copy", "1", target, str(work / "copy")], work / "copy"),
        "copy, all threads": ([*plain, "copy", threads, target, str(work / "copies")],
                              work / "copies"),
        "merge": ([*ours, "merge", "--adapter", str(adapter), "--target", target, "--out",
                   str(work / "merge")], work / "merge")}
    cuda = ["--cuda"] if device == "cuda" else []
    if "mergekit" in args.peers:
        found["mergekit extract"] = (
            [python, "-m", "mergekit.scripts.extract_lora", "--model", tuned, "--base-model", base,
             "--max-rank", str(args.rank), "--out-path", str(work / "mk"), *cuda], work / "mk")
        recipe = work / "mergekit.yml"
        recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels:\n"
                          f"  - model: {target}+{adapter}\n")
        found["mergekit merge"] = (
            [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(work / "mk-merge"),
             "--lora-merge-cache", str(work / "mk-cache"), *cuda], work / "mk-merge")
    if "peft" in args.peers:
        found["peft merge"] = ([python, str(HERE / "peft_merge.py"), target, str(adapter),
                                str(work / "peft"), device], work / "peft")
    only = [name.strip() for name in args.only.split(",") if name.strip()]
    return {name: entry for name, entry in found.items() if not only or name in only}


def measure(args: argparse.Namespace, device: str) -> dict[str, list[dict[str, Any]]]:
    work = args.out / f"work-{args.name}"
    work.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads),
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                   "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[dict[str, Any]]] = {}
    kept = work / "extract"  # merges read it
    for _ in range(args.rounds):
        for name, (command, out) in contenders(args, device).items():
            for leftover in {out, work / "mk-cache"} - {None}:
                shutil.rmtree(leftover, ignore_errors=True)
            cold = args.cold and drop_caches()
            row = run(command, work / "log.txt", environment=environment,
                      limit_seconds=args.limit_seconds)
            row["cold"] = cold
            if out is not None and out.exists():
                row["bytes"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
            if row["exit_code"] != 0:
                row["error"] = (work / "log.txt").read_text(errors="replace")[-2000:]
            found.setdefault(name, []).append(row)
            print(f"{name}: {row['seconds']:.2f} s, exit {row['exit_code']}, "
                  f"{row['anonymous_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
            if out is not None and out != kept:
                shutil.rmtree(out, ignore_errors=True)
    return found


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and the ratios that the targets are about; a failed contender has none."""
    medians = {}
    for name, rows in runs.items():
        good = [row for row in rows if row["exit_code"] == 0]
        medians[name] = None if len(good) < len(rows) else {
            key: statistics.median(row[key] for row in good)
            for key in ("seconds", "cpu_seconds", "anonymous_bytes", "resident_bytes")}
    ratios = {}
    for name, over in (("mergekit extract", "extract"), ("extract", "read"),
                       ("extract", "read, all threads"), ("merge", "copy"),
                       ("merge", "copy, all threads"), ("peft merge", "merge"),
                       ("mergekit merge", "merge"), ("extract, noise rule", "extract")):
        if medians.get(name) and medians.get(over):
            ratios[f"{name} / {over}"] = medians[name]["seconds"] / medians[over]["seconds"]
    return {"medians": medians, "ratios": ratios}


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# Extraction and merging at {result['shape']} shape", "", f"`{result['command']}`",
             "", f"Commit {result['commit']}, {result['date']}, {result['machine']}, torch "
             f"{result['torch']}, {result['threads']} threads, {result['rounds']} rounds"
             f"{', page cache emptied before each' if result['cold'] else ''}.", "",
             "| command | seconds | CPU seconds | peak GB, anonymous | with mapped files |",
             "| --- | --- | --- | --- | --- |"]
    for name, row in result["medians"].items():
        lines.append(f"| {name} | failed | | | |" if row is None else
                     f"| {name} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | "
                     f"{row['anonymous_bytes'] / 1e9:.2f} | {row['resident_bytes'] / 1e9:.2f} |")
    lines += ["", "| ratio | |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["ratios"].items()]
    if result["accuracy"]:
        accuracy = result["accuracy"]
        lines += ["", f"Residual above the best of rank {result['rank']}, over "
                  f"{accuracy['modules']} modules: mean {accuracy['mean_excess']:.3%}, largest "
                  f"{accuracy['max_excess']:.3%}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import torch
    from surgery_bench.accuracy import excess_residual
    from surgery_bench.shapes import SHAPES, SHARD_BYTES, make_models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[args.shape]
    make_models(replace(shape, layers=args.layers or shape.layers), args.models, device=device,
                max_shard_bytes=SHARD_BYTES.get(args.shape, 10**12))
    runs = measure(args, device)
    adapter = args.out / f"work-{args.name}" / "extract"
    accuracy = excess_residual(args.models / "base", args.models / "tuned", adapter,
                               every=args.every, device=device) if adapter.exists() else None
    commit = args.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
        text=True).stdout.strip()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else "no GPU"
    result = {"schema": 1, "shape": args.name, "command": " ".join(["bench_surgery.py",
              *(arguments if arguments is not None else sys.argv[1:])]), "commit": commit,
              "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__,
              "machine": f"{os.cpu_count()} cores ({platform.machine()}), {gpu}",
              "threads": args.threads, "rounds": args.rounds, "cold": args.cold,
              "rank": args.rank, "runs": runs, "accuracy": accuracy, **summarize(runs)}
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (args.out / f"{args.name}.md").write_text(markdown(result))
    print(markdown(result))
    return 0 if all(result["medians"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
