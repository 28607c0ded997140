#!/usr/bin/env python3
"""Train a small model for some steps in every way that training knows, and compare the losses.

    torchrun --nproc_per_node 2 scripts/check_train_gpu.py --out docs/results/train/check-gpu.md

A Llama with random weights on made-up text, fp32 weights that layers multiply in bf16 as in a real
run. Each way trains the same rows: where it may not change a bit, losses must be equal; elsewhere
they must stay within what rounding explains. On GPUs, where attention's backward sums in an order
that changes from run to run (`again` shows by how much), equal is asked of the first loss alone.
One way compiles its layers; the others do not, since that would take most of their time. Prints a
way when it is done and writes the table so far; the exit code is the number of ways that failed.
Works on CPU processes too, at a smaller size (--length 256 --width 64).
"""

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny_model import save_text, save_tiny_model  # noqa: E402

from extend.errors import ExtendError  # noqa: E402
from extend.train.loop import run_process  # noqa: E402
from extend.train.mesh import join_processes  # noqa: E402
from extend.train_options import TrainOptions  # noqa: E402

_SAME, _ROUNDING, _LOW_BITS = 0.0, 5e-3, 2e-2  # largest relative difference of a loss
_BEGIN = None  # only the first loss is the same: other weights are trained
WAYS: dict[str, tuple[dict[str, Any], str, float | None]] = {
    # name: changes of the options, the way it is compared with, the most that losses may differ
    "plain": ({}, "plain", _SAME),
    "again": ({}, "plain", _SAME),
    "compiled": ({"compile": True}, "plain", _ROUNDING),
    "no layer computed again": ({"recomputed_layers": 0}, "plain", _ROUNDING),
    "attention computed again": ({"kept_attention": 0}, "plain", _SAME),
    "host memory": ({"host_memory": "4GiB"}, "plain", _SAME),
    "host memory, fp8": ({"host_memory": "4GiB", "kept_form": "fp8"}, "plain", _LOW_BITS),
    "tiles": ({"tile_tokens": 1000}, "plain", _ROUNDING),
    "checkpoints in the background": ({"save_in_background": True, "save_every": 1,
                                       "keep_checkpoints": 2}, "plain", _SAME),
    "all-gather": ({"strategy": "all-gather"}, "plain", _ROUNDING),
    "ulysses": ({"strategy": "ulysses"}, "plain", _ROUNDING),
    "tensor parallel": ({"tensor_parallel": 2}, "plain", _ROUNDING),
    "replicas": ({"shard_over": 1}, "plain", _ROUNDING),
    "adamw-offload": ({"optimizer": "adamw-offload"}, "plain", _ROUNDING),
    "adamw-8bit": ({"optimizer": "adamw-8bit"}, "plain", _LOW_BITS),
    "bf16 weights, 8 bits, stochastic": (
        {"optimizer": "adamw-8bit", "weight_dtype": "bfloat16", "stochastic_rounding": True},
        "plain", _LOW_BITS),
    "float8": ({"linear_dtype": "float8"}, "plain", _LOW_BITS),
    "float8-rowwise": ({"linear_dtype": "float8-rowwise"}, "plain", _LOW_BITS),
    "lora": ({"mode": "lora", "lora_rank": 8}, "lora", _SAME),
    "lora, tensor parallel": ({"mode": "lora", "lora_rank": 8, "tensor_parallel": 2}, "lora",
                              _ROUNDING),
    "lora, norms, embeddings": ({"mode": "lora", "lora_rank": 8,
                                 "trained_beside": ["norms", "embeddings"]}, "lora", _BEGIN),
}


def make_inputs(directory: Path, args: argparse.Namespace) -> None:
    heads = max(2, args.width // 128)
    save_tiny_model(directory / "model", "llama", native_len=args.length, rope_theta=1e4,
                    hidden_size=args.width, intermediate_size=args.width * 3,
                    num_hidden_layers=4, num_attention_heads=2 * heads, num_key_value_heads=heads,
                    head_dim=args.width // heads // 2, initializer_range=0.05)
    save_text(directory / "text.jsonl", documents=200, lines=max(20, args.length // 200))


def make_options(directory: Path, args: argparse.Namespace, changes: dict[str, Any]
                 ) -> TrainOptions:
    base = {"model": str(directory / "model"), "compute_dtype": "bfloat16", "nproc": "auto",
            "data": [{"kind": "text", "path": str(directory / "text.jsonl")}], "save_every": 100,
            "schedule": [{"length": args.length, "steps": args.steps, "lr": 1e-4}],
            "recomputed_layers": "all", "compile": False,
            "token_cache": str(directory / "tokens")}
    return TrainOptions(**base | changes)


def train(name: str, options: TrainOptions, out: Path) -> dict[str, Any]:
    """Losses, seconds of the last step and memory; or the error."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    try:
        run_process(options, out, False)
    except (ExtendError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in lines], "step_seconds": lines[-1]["seconds"],
            "seconds": round(time.monotonic() - begin, 1),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30
            if torch.cuda.is_available() else 0.0}


def judge(found: dict[str, dict[str, Any]], name: str) -> str:
    _, other, limit = WAYS[name]
    one, base = found[name], found.get(other, {})
    if "error" in one:
        return one["error"]
    if "losses" not in base:
        return f"nothing to compare with: {other} failed"
    apart = [abs(a - b) / abs(b) for a, b in zip(one["losses"], base["losses"], strict=True)]
    one["difference"] = most = apart[0] if limit is _BEGIN else max(apart)
    if limit in (_SAME, _BEGIN) and apart[0]:
        return f"the first loss differs by {apart[0]:.2e}"
    if limit == _SAME and torch.cuda.is_available():
        limit = _ROUNDING
    return "ok" if limit is _BEGIN or most <= limit else f"differs by {most:.2e}, not {limit:g}"


def render(found: dict[str, dict[str, Any]], verdicts: dict[str, str], where: str) -> str:
    lines = ["# Training in every way, compared", "", where, "",
             "| way | compared with | loss, first and last step | largest difference | "
             "s, last step | GiB | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in found.items():
        losses = row.get("losses")
        numbers = (f"{losses[0]:.5f}, {losses[-1]:.5f} | {row.get('difference', 0):.1e} | "
                   f"{row['step_seconds']:.2f} | {row['peak_gib']:.2f}" if losses
                   else "| | |")
        lines.append(f"| {name} | {WAYS[name][1]} | {numbers} | {verdicts[name]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=WAYS)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("extend").setLevel(logging.ERROR)
    directory = Path(os.environ.get("CHECK_DIR") or tempfile.gettempdir()) / "check-train-gpu"
    found: dict[str, dict[str, Any]] = {}
    failed = 0
    with join_processes() as processes:
        if processes.is_main:
            subprocess.run(["rm", "-rf", str(directory)], check=True)
            make_inputs(directory, args)
        processes.barrier()
        for number, name in enumerate(WAYS):
            if args.only and name not in {*args.only, *(WAYS[n][1] for n in args.only)}:
                continue
            options = make_options(directory, args, WAYS[name][0])
            found[name] = train(name, options, directory / f"out-{number}")
            gc.collect()
            if processes.is_main:
                print(name, json.dumps(found[name]), flush=True)
                failed = report(found, args, processes.world)
    return failed


def report(found: dict[str, dict[str, Any]], args: argparse.Namespace, world: int) -> int:
    verdicts = {name: judge(found, name) for name in found}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                           capture_output=True, text=True).stdout.strip()
    text = render(found, verdicts, (
        f"`scripts/check_train_gpu.py --length {args.length} --width {args.width} --steps "
        f"{args.steps}`, {world} x {gpu}, torch {torch.__version__}, commit {commit}."))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    return sum(verdict != "ok" for verdict in verdicts.values())


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
