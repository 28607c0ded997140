#!/usr/bin/env python3
"""Does a long context transfer to a fine-tune, and what does it cost the fine-tune's skill?

    python scripts/make_skills.py --level tiny --out data/skills
    python scripts/transfer_trials.py --level tiny --out runs/transfer/tiny        # CPU, minutes

    python scripts/make_skills.py --level smollm2 --out data/skills
    python scripts/transfer_trials.py --level smollm2 --out runs/transfer/smollm2  # all GPUs

The base is trained on long rows under several RoPEs ("long models"), and fine-tuned on several
skills for 10, 100 and 1000 steps ("targets"). Then each long model's delta is put on each target:
whole, of every rank, with norms in, out or folded, by parts, shuffled, at several weights, and by
mergers that give way where the two deltas collide, or that learn from unlabelled prompts. Every
merge is scored on the target's skill (exact match, Wilson interval), on the KL of its answers and
of short text from the target by itself, and on passkeys in filler and in held-out text at four
times the native length.

Work is spread over processes, one for each GPU (one on the CPU). Trained models stay on disk, and
every row is written when it is measured: the same command, given again, goes on where it was
stopped, and --budget stops it cleanly. Tables and plots are drawn from whatever rows there are.
Nothing is downloaded.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from merge_safety import visible
from transfer_lab.plan import LEVELS, ROOT, Level


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--level", choices=LEVELS, required=True)
    add("--out", type=Path, required=True)
    add("--skills-dir", type=Path, default=ROOT / "data/skills")
    add("--groups", type=lambda text: set(text.split(",")), help="only these groups of merges")
    add("--budget", type=float, help="seconds after which nothing new is begun")
    add("--stage", choices=("all", "train", "trials", "collect"), default="all")
    add("--long-steps", type=int, help="steps of the long models")
    add("--steps", type=lambda text: tuple(map(int, text.split(","))),
        help="steps after which a fine-tune is taken as a target")
    add("--studied", type=int, help="which of these targets are studied closely")
    add("--limit", type=int, help="score only so many examples of a skill")
    add("--depths", type=int, help="passkeys of each length and kind of text")
    add("--seed", type=int, default=0)
    add("--commit", default="unknown", help="recorded in the results")
    add("--share", choices=("train", "trials"), help=argparse.SUPPRESS)  # a process of that stage
    add("--deadline", type=float, help=argparse.SUPPRESS)  # time.time() at which --budget ends
    return parser.parse_args(arguments)


def make_level(args: argparse.Namespace) -> Level:
    """The level, as the options change it."""
    given = {key: getattr(args, key) for key in ("steps", "studied", "limit", "depths")}
    level = replace(LEVELS[args.level], **{k: v for k, v in given.items() if v is not None})
    if level.studied not in level.steps:
        sys.exit(f"--studied {level.studied} is none of --steps {level.steps}; name one of them")
    return level


def run_share(args: argparse.Namespace, stage: str) -> None:
    """What one process does of a stage: whatever no other process has begun."""
    import torch
    from transfer_lab.bench import Bench
    from transfer_lab.prepare import make_factors, make_longs, make_targets
    from transfer_lab.units import Clock, run_units
    from transformers.utils.logging import disable_progress_bar

    torch.set_float32_matmul_precision("high")
    disable_progress_bar()
    level, clock = make_level(args), Clock(args.deadline)
    if stage == "train":
        make_longs(args.level, level, args.out, args.seed, args.long_steps, clock)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(args.level, level, args.out, args.skills_dir, args.seed, args.commit, device)
    if stage == "train":
        make_targets(bench, clock)
        make_factors(bench)
    else:
        run_units(bench, clock, args.groups)


def spread(arguments: list[str], args: argparse.Namespace, stage: str, count: int) -> bool:
    """Do a stage in one process for each GPU; whether all of them ended well."""
    command = [sys.executable, __file__, *arguments, "--share", stage]
    if args.deadline is not None:
        command += ["--deadline", repr(args.deadline)]
    running = [subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpu)})
               for gpu in range(count)]
    codes = [process.wait() for process in running]
    if any(codes):
        print(f"{stage}: processes ended with exit codes {codes}; their messages are above",
              file=sys.stderr)
    return not any(codes)


def run_stage(arguments: list[str], args: argparse.Namespace, stage: str) -> bool:
    """Do a stage in this process, or in one for each of several GPUs; whether all went well."""
    import torch
    from transfer_lab.claims import drop_claims

    drop_claims(args.out)
    if torch.cuda.device_count() > 1:
        return spread(arguments, args, stage, torch.cuda.device_count())
    try:
        run_share(args, stage)
    except SystemExit as error:  # what there is, is collected all the same
        print(error, file=sys.stderr)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.share:
        run_share(args, args.share)
        return 0
    if args.budget is not None:
        args.deadline = time.time() + args.budget
    from transfer_lab.prepare import write_prose
    from transfer_lab.report import collect

    make_level(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_prose(args.out)
    stages = {"all": ("train", "trials"), "collect": ()}.get(args.stage, (args.stage,))
    ended = [run_stage(arguments, args, stage) for stage in stages]
    for path in collect(args.out):
        print(path)
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
