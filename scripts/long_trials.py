#!/usr/bin/env python3
"""Which RoPE schedule takes a model farthest, and what do it, its adapter and siblings keep?

    python scripts/make_skills.py --level tiny --out data/skills
    python scripts/long_trials.py --level tiny --out runs/long/tiny              # CPU, minutes

    python scripts/make_skills.py --level smollm2 --out data/skills
    python scripts/long_trials.py --level smollm2 --out runs/long/smollm2 --budget 560   # one GPU

Under each schedule the shipped model is trained on the same rows for one target length. Groups of
measures, in this order:

    short      loss and KL of short text of the kind trained on and of another, beside the shipped
    needles    passkeys in filler and in held-out text, number and multi-key needles, by length
    siblings   fine-tunes on narrow skills: skill, passkeys, prose before and after each merge
    ranks      passkeys in text by the rank of the adapter (--rank-of), with and without sidecar
    grid-text  dozens of keys in one row of held-out text as long as the target, asked at every
               length on its way: a heat map for one prefill
    positions  loss by position to the target on held-out text
    grid       as grid-text, in filler

Everything stays on disk: the same command, given again, goes on where it was stopped. --budget
begins nothing that is not expected to end in time; --list says what is still to do, and for how
long. A model is made when a measure first needs it. Tables and plots are drawn from whatever there
is; that takes no models, and --from a results.json goes on elsewhere with what it holds. Nothing
is downloaded.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from long_lab.levels import LEVELS, make_plan, write_far_text
from long_lab.plan import GROUPS, Plan, describe, list_units, parse_phases

from extend.option_types import parse_length


def lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(parse_length, text.split(","))))


def siblings(text: str) -> dict[str, int]:
    """Read `record:200,dates:400`."""
    return {skill: int(steps) for skill, steps in (part.split(":") for part in text.split(","))}


def share(text: str) -> float:
    found = float(text)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give one from 0 to 1")
    return found


OPTIONS = {  # of the plan
    "model": (Path, "directory of the shipped model"),
    "train_text": (Path, "text that is trained on"), "docs": (Path, "held-out text of that kind"),
    "prose": (Path, "held-out text of another kind"),
    "far_text": (Path, "held-out text of the target's length; docs and prose together"),
    "skills": (Path, "folder of SKILL/{train,test}.jsonl"),
    "phases": (parse_phases, "LENGTH:STEPS[:RATE[:ROWS]],..., of every schedule alike"),
    "taught": (share, "share of long text rows that are distilled from the shipped model, of 1"),
    "siblings": (siblings, "SKILL:STEPS,..."),
    "needles": (lengths, "lengths of single prompts"),
    "far": (lengths, "lengths of the streamed grid and, the last, of the loss by position"),
    "at": (parse_length, "length at which merges and ranks are asked"),
    "depths": (int, "of single prompts"), "trials": (int, "of single prompts, for each depth"),
    "grid_depths": (int, "of the streamed grid"), "grid_rows": (int, "of the streamed grid"),
    "position_windows": (int, "windows of the loss by position"),
    "limit": (int, "examples of a skill"),
    "ranks": (lambda text: tuple(text.split(",")), "ranks, `noise` or `whole`"),
    "rank_of": (str, "schedule whose adapter is studied by rank"),
    "merge_rank": (str, "rank of the adapter that siblings are given; `whole`: no adapter"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--level", choices=LEVELS, required=True)
    add("--out", type=Path, required=True)
    add("--target", type=parse_length, help="tokens that every schedule is made for")
    add("--search", type=Path, help="rope-merge-safe.json of `extend search`, carried on to the "
                                    "target if it was made for another length")
    add("--schedules", type=lambda text: text.split(","), help="only these, in this order")
    for name, (kind, words) in OPTIONS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=words)
    add("--groups", type=lambda text: set(text.split(",")),
        help=f"only these of {', '.join(GROUPS)}")
    add("--budget", type=float, help="seconds after which nothing new is begun")
    add("--list", action="store_true", help="say what is to do and how long it is expected to take")
    add("--collect", action="store_true", help="only draw tables and plots")
    add("--from", dest="record", type=Path, help="results.json of an earlier run, to go on from")
    add("--seed", type=int, default=0)
    add("--commit", default="unknown", help="recorded in the results")
    args = parser.parse_args(arguments)
    unknown = (args.groups or set()) - set(GROUPS)
    if unknown:
        parser.error(f"--groups: {', '.join(sorted(unknown))} unknown; choose of "
                     f"{', '.join(GROUPS)}")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """The level's plan, as the options change it.

    Raises:
        SystemExit: a schedule that is none.
    """
    plan = make_plan(args.level, args.out, target=args.target, search=args.search)
    for name in (*(args.schedules or ()), args.rank_of or plan.rank_of):
        if name not in plan.ropes:
            sys.exit(f"{name} is no schedule here; they are {', '.join(plan.ropes)}"
                     + ("" if "merge-safe" in plan.ropes else " (and merge-safe, with --search)"))
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if "train_text" in given:
        given["short_texts"] = (given["train_text"],)
    ropes = {name: plan.ropes[name] for name in args.schedules or plan.ropes}
    return replace(plan, ropes=ropes, **given)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    begin, plan = time.time(), plan_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    from long_lab.report import collect, restore, todo
    from long_lab.work import Workshop, open_units, run_units, say
    from transfer_lab.claims import Clock
    from transfer_lab.prepare import write_prose

    if args.record is not None:
        restore(args.out, args.record)
    shop = Workshop(plan, args.out, args.seed)
    units = open_units(list(list_units(plan)), args.out, args.groups)
    if args.list:
        print(todo(plan, shop, units))
        return 0
    left: list[str] = []
    if not args.collect:
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_float32_matmul_precision("high")
        disable_progress_bar()
        if args.level == "tiny":
            write_prose(args.out)
        write_far_text(plan)
        say(describe(plan))
        deadline = None if args.budget is None else begin + args.budget
        left = run_units(shop, units, Clock(deadline), args.commit)
        if left:
            say(f"left: {'; '.join(left)}")
    for path in collect(args.out, plan):
        print(path)
    return 1 if any("error" in name for name in left) else 0


if __name__ == "__main__":
    sys.exit(main())
