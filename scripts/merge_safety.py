#!/usr/bin/env python3
"""Which RoPE changes leave the skills of a model's fine-tunes alone?

    python scripts/make_skills.py --level tiny --out data/skills
    python scripts/merge_safety.py --level tiny --out runs/merge-safety/tiny   # CPU, minutes

    python scripts/make_skills.py --level smollm2 --out data/skills
    python scripts/merge_safety.py --level smollm2 --out runs/merge-safety/smollm2  # all GPUs

For each skill and each of several strengths the base is fine-tuned under its own RoPE. Then, with
no further training, every RoPE setting is put under that sibling: its skill (exact match, Wilson
interval), its loss on the right answers, and the KL of its answers from those under the native
RoPE. The base's text loss and KL are taken under the same settings. Unless --no-longs, long models
are trained under some of the settings and their deltas added to each sibling's: how much of the
skill a merge keeps, and whether it finds passkeys beyond the native length.

Work is spread over processes, one for each GPU (one on the CPU). --shard I/N does one share and
--collect joins what the shares wrote into results.json, table.md and the plots; a share writes
after each sibling, so an interrupted run can be collected too. --stage long does only the long
models. Nothing is downloaded.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

ROOT = Path(__file__).resolve().parents[1]
LEVELS: dict[str, dict[str, Any]] = {
    "tiny": {"model": ROOT / "assets/demo/base", "skills": ["record", "reverse", "code", "lookup"],
             "text": [ROOT / "data/skills/tiny/text.txt"], "windows": 32, "window": 192,
             "limit": 100, "step_tokens": 1024, "batch_tokens": 8192,
             "long_text": ROOT / "assets/demo/notes.jsonl", "passkey_text": None},
    "smollm2": {"model": ROOT / "data/smollm2-135m-instruct",
                "skills": ["record", "reverse", "dates", "code", "lookup"],
                "text": [ROOT / "data/text/heldout-prose/jargon-000-jargon-jargon.txt"],
                "windows": 48, "window": 1024, "limit": 200, "step_tokens": 6144,
                "batch_tokens": 32768,
                "long_text": ROOT / "data/text/train/python-doc",
                "passkey_text":
                    ROOT / "data/text/heldout-docs/linux-012-core-api-asm-annotations.txt"},
}
"""level -> defaults of the options below."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--level", choices=LEVELS, required=True)
    add("--out", type=Path, required=True)
    add("--model", type=Path)
    add("--skills-dir", type=Path, default=ROOT / "data/skills")
    add("--skills", type=lambda text: text.split(","))
    add("--text", type=Path, nargs="+", help="text files for the base's loss and KL")
    add("--long-text", type=Path, help="text that the long models are trained on")
    add("--passkey-text", type=Path, help="text that passkeys are hidden in; tiny: filler")
    add("--factors", type=lambda text: tuple(map(int, text.split(","))), default=(4, 16, 128))
    add("--limit", type=int, help="score only so many prompts of a skill")
    add("--steps-scale", type=float, default=1.0, help="times the steps of every fine-tune")
    add("--long-steps", type=int, help="steps of the long models")
    add("--windows", type=int, help="windows of text")
    add("--window", type=int, help="tokens of a window")
    add("--stride", type=int, default=4, help="every so many tokens of a window are asked for")
    add("--step-tokens", type=int, help="tokens of a fine-tuning step")
    add("--batch-tokens", type=int, help="tokens of a forward in scoring")
    add("--seed", type=int, default=0)
    add("--shard", help="I/N: do only this share, counted from 0")
    add("--stage", choices=("all", "long", "siblings", "collect"), default="all")
    add("--collect", action="store_const", const="collect", dest="stage")
    add("--no-longs", action="store_true", help="no long models and no merges")
    add("--no-passkeys", dest="passkeys", action="store_false")
    add("--commit", default="unknown", help="recorded in the results")
    args = parser.parse_args(arguments)
    for name, value in LEVELS[args.level].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.passkeys = args.passkeys and not args.no_longs
    return args


def run_share(args: argparse.Namespace, shard: int, shards: int) -> None:
    """The long models or the siblings of one process."""
    import torch
    from safety_trials import longs, trials
    from safety_trials.settings import STRENGTHS
    from transformers.utils.logging import disable_progress_bar

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    disable_progress_bar()
    plan = longs.LONGS[args.level]
    if args.stage in ("all", "long") and not args.no_longs:
        make_longs(args, plan, shard, shards)
    if args.stage == "long":
        return
    bench = trials.Bench(args, plan, device)
    if not args.no_longs:
        bench.longs = [longs.read_long(name, long_folder(args, name), bench.subject)
                       for name in plan.settings if long_folder(args, name).exists()]
    jobs = trials.make_jobs(args.skills, STRENGTHS[args.level], args.steps_scale)
    own = trials.share_jobs(jobs, shards)[shard]
    trials.run_jobs(bench, own, args.out / f"shard-{shard}-of-{shards}.json")


def long_folder(args: argparse.Namespace, setting: str) -> Path:
    from safety_trials.longs import folder_name

    return args.out / "long" / folder_name(setting)


def make_longs(args: argparse.Namespace, plan: Any, shard: int, shards: int) -> None:
    """Train this share of the long models."""
    from dataclasses import replace

    from safety_trials.longs import train_long
    from safety_trials.settings import make_settings

    from extend.model_config import read_config

    native = read_config(args.model).rope
    known = {setting.name: setting for setting in make_settings(native)}
    plan = replace(plan, steps=args.long_steps or plan.steps)
    for name in plan.settings[shard::shards]:
        folder = long_folder(args, name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        train_long(str(args.model), known[name], plan, str(args.long_text), native.original_len,
                   folder, args.seed)
        print(f"long model {name}: {folder}", file=sys.stderr, flush=True)


def spread(arguments: list[str], stage: str, shards: int) -> bool:
    """Run `stage` in one process for each GPU; whether all of them ended well."""
    running = []
    for shard in range(shards):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible(shard)}
        command = [sys.executable, __file__, *arguments, "--stage", stage,
                   "--shard", f"{shard}/{shards}"]
        running.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in running]
    failed = [shard for shard, code in enumerate(codes) if code]
    if failed:
        print(f"{stage}: processes {failed} of {shards} failed (exit codes "
              f"{[codes[shard] for shard in failed]}); their messages are above", file=sys.stderr)
    return not failed


def visible(gpu: int) -> str:
    """The name of the gpu-th of the GPUs that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[gpu] if names else str(gpu)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    ok = True
    if args.stage != "collect":
        if args.shard:
            shard, shards = map(int, args.shard.split("/"))
            run_share(args, shard, shards)
            return 0
        import torch

        shards = torch.cuda.device_count()
        if shards > 1:
            stages = {"all": ("long", "siblings")}.get(args.stage, (args.stage,))
            ended = [spread(arguments, stage, shards) for stage in stages]
            ok = all(ended)
        else:
            run_share(args, 0, 1)
    from safety_trials.report import collect

    for path in collect(args.out):
        print(path)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
