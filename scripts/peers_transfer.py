#!/usr/bin/env python3
"""A long context given to fine-tunes by mergekit, by PEFT and by extend, from the same files.

    python scripts/peers_transfer.py --base BASE --long LONG --target record=SIBLING \
        --skill record=data/skills/smollm2/record/test.jsonl --docs data/text/heldout-docs \
        --prose data/text/heldout-prose --lengths 8k,32k,128k --out runs/peers

From each long model and target these merges are made, with the tools' own commands:

    extend              `extend extract` and `extend merge` of that adapter
    mergekit            `mergekit-extract-lora`, then `mergekit-yaml`, TARGET+ADAPTER
    mergekit-delta      `mergekit-yaml`, task_arithmetic of base, target and long model
    peft                the adapter of extend, merged by PEFT's merge_and_unload
    peft-mergekit       the adapter of mergekit, merged by PEFT's merge_and_unload

and of every merge but the first also a copy with +rope in its name: the same weights, with the keys
of RoPE and length in config.json copied from the long model by hand. All are asked the same: skill,
passkeys in filler and in held-out text by length, loss of short text; so is each target by itself.

Merging (--stage make) runs on a CPU and needs mergekit and PEFT; --stage measure needs neither.
What is there is not made or measured again; --budget begins nothing after so many seconds. A tool
that fails is told with the end of its log, in the table too. Nothing is downloaded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from extend.option_types import parse_length

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ALONE, ROPE, CACHE = "alone", "+rope", "cache"
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")


def pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path).resolve()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=lambda text: Path(text).resolve(), required=True)
    add("--long", type=lambda text: Path(text).resolve(), required=True)
    add("--target", type=pair, action="append", required=True, help="NAME=DIR; again for another")
    add("--skill", type=pair, action="append", default=[], help="NAME=test.jsonl of that target")
    add("--docs", type=Path, required=True, help="held-out text to hide passkeys in")
    add("--prose", type=Path, required=True, help="held-out text for the loss")
    add("--out", type=Path, required=True)
    add("--rank", type=int, default=27)
    add("--lengths", type=lambda text: [parse_length(part) for part in text.split(",")],
        required=True)
    add("--depths", type=int, default=5)
    add("--trials", type=int, default=2)
    add("--limit", type=int, default=200, help="examples of a skill")
    add("--window", type=int, default=2048, help="tokens of a window of the loss")
    add("--window-tokens", type=int, default=65536)
    add("--stage", choices=("all", "make", "measure", "collect"), default="all")
    add("--budget", type=float, help="seconds after which nothing new is begun")
    add("--commit", default="unknown", help="recorded in the results")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.target, args.skill = dict(args.target), dict(args.skill)
    args.deadline = None if args.budget is None else time.time() + args.budget
    return args


# ---- making --------------------------------------------------------------------------------------

def adapters(args: argparse.Namespace) -> dict[str, list[str]]:
    """Tool -> the command that extracts its adapter."""
    where = args.out / "adapters"
    return {"extend": ["-m", "extend", "extract", "--base", str(args.base), "--tuned",
                       str(args.long), "--rank", str(args.rank), "--dtype", "bfloat16",
                       "--out", str(where / "extend")],
            "mergekit": ["-m", "mergekit.scripts.extract_lora", "--model", str(args.long),
                         "--base-model", str(args.base), "--max-rank", str(args.rank),
                         "--out-path", str(where / "mergekit")]}


def merges(args: argparse.Namespace, target: Path, where: Path) -> dict[str, list[str]]:
    """Tool -> the command that merges into a target; writes mergekit's files."""
    ours, theirs = (str(args.out.resolve() / "adapters" / name) for name in ("extend", "mergekit"))
    files = {"mergekit": {"merge_method": "passthrough", "dtype": "bfloat16",
                          "models": [{"model": f"{target}+{theirs}"}]},
             "mergekit-delta": {"merge_method": "task_arithmetic", "dtype": "bfloat16",
                                "base_model": str(args.base),
                                "models": [{"model": str(model), "parameters": {"weight": 1.0}}
                                           for model in (target, args.long)]}}
    for name, content in files.items():  # JSON is YAML
        (where / f"{name}.yml").write_text(json.dumps(content, indent=1), encoding="utf-8")
    peft = [str(HERE / "surgery_bench/peft_merge.py"), str(target)]
    kit = ["-m", "mergekit.scripts.run_yaml"]
    return {"extend": ["-m", "extend", "merge", "--adapter", ours, "--target", str(target),
                       "--out", str(where / "extend")],
            "mergekit": [*kit, str(where / "mergekit.yml"), str(where / "mergekit"),
                         "--lora-merge-cache", str(where / CACHE)],
            "mergekit-delta": [*kit, str(where / "mergekit-delta.yml"),
                               str(where / "mergekit-delta")],
            "peft": [*peft, ours, str(where / "peft"), "cpu"],
            "peft-mergekit": [*peft, theirs, str(where / "peft-mergekit"), "cpu"]}


def make(args: argparse.Namespace) -> None:
    """All adapters and merges that are not there; NAME.json says what came of each."""
    for name, command in adapters(args).items():
        run_tool(args, args.out / "adapters" / name, command)
    for target_name, target in args.target.items():
        where = args.out / "merged" / target_name
        where.mkdir(parents=True, exist_ok=True)
        for name, command in merges(args, target, where).items():
            run_tool(args, where / name, command)
            made = where / name
            if name != "extend" and (made / "config.json").exists():
                give_tokenizer(target, made)
                with_rope(made, where / f"{name}{ROPE}", args.long)


def run_tool(args: argparse.Namespace, out: Path, command: list[str]) -> None:
    record = out.with_name(f"{out.name}.json")
    if record.exists() or late(args):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (out, out.with_name(CACHE)):  # mergekit trusts half a model in it
        shutil.rmtree(leftover, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH":
                   os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.exists() else 0
    ok = done.returncode == 0 and out.exists()
    record.write_text(json.dumps({"seconds": seconds, "bytes": size, "ok": ok, "command": command,
                                  "log": "" if ok else done.stdout[-2000:]}, indent=1),
                      encoding="utf-8")
    say(f"{out.name}: {'' if ok else 'FAILED, '}{seconds:.1f} s, {size / 2**20:.1f} MiB")


def give_tokenizer(source: Path, out: Path) -> None:
    """PEFT's script writes a model without one, which the measures need."""
    for file in source.glob("*token*"):
        if not (out / file.name).exists():
            shutil.copy(file, out / file.name)


def with_rope(merged: Path, out: Path, long: Path) -> None:
    """The same weights under the long model's RoPE and length: what a careful user would mend."""
    if out.exists():
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(merged, partial, copy_function=os.link)
    known, wanted = (json.loads((folder / "config.json").read_text(encoding="utf-8"))
                     for folder in (merged, long))
    config = {key: value for key, value in known.items() if key not in ROPE_KEYS}
    config |= {key: wanted[key] for key in ROPE_KEYS if key in wanted}
    (partial / "config.json").unlink()  # a link: the merge's own must stay as it is
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    partial.rename(out)


# ---- measuring -----------------------------------------------------------------------------------

def models(args: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
    """(target, merge, directory) of all that is there to be measured."""
    for name, target in args.target.items():
        yield name, ALONE, target
        where = args.out / "merged" / name
        for made in sorted(where.glob("*/config.json")):
            if not made.parent.name.endswith((".partial", CACHE)):
                yield name, made.parent.name, made.parent


def tasks(args: argparse.Namespace, target: str) -> list[dict[str, Any]]:
    grid = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials,
            "controls": False}
    skill = [] if target not in args.skill else [
        {"task": "exact-match", "name": "skill", "file": str(args.skill[target]),
         "limit": args.limit}]
    return [*skill, {"task": "passkey", **grid},
            {"task": "passkey-text", "haystack": str(args.docs), **grid},
            {"task": "loss", "name": "prose", "text": str(args.prose), "window": args.window,
             "max_tokens": args.window_tokens}]


def measure(args: argparse.Namespace) -> list[str]:
    """Measure what is there; the names of what failed, with the message."""
    import extend
    from extend.errors import ExtendError

    failed = []
    for target, merge, path in models(args):
        out = args.out / "results" / target / merge
        if out.exists() or late(args):
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        try:
            extend.evaluate(path, out, tasks=tasks(args, target), seed=args.seed)
        except (ExtendError, ValueError, RuntimeError, OSError) as error:
            failed.append(f"{target}, {merge}: {error}")
            say(f"{target}, {merge}: FAILED: {error}")
            continue
        say(f"{target}, {merge}: {time.perf_counter() - begin:.1f} s")
    return failed


# ---- results -------------------------------------------------------------------------------------

def collect(args: argparse.Namespace, failed: list[str]) -> list[Path]:
    from extend.output import write_json
    from extend.results import read_results

    tools = {f"{path.parent.name}/{path.stem}": json.loads(path.read_text(encoding="utf-8"))
             for path in sorted((args.out).glob("adapters/*.json"))
             + sorted((args.out).glob("merged/*/*.json"))}
    found = {}
    for path in sorted((args.out / "results").glob("*/*/results.json")):
        (result,) = read_results({path.parent.name: path.parent})
        found[path.parents[1].name, path.parent.name] = {
            "model": result.data["model"], "summary": result.data["summary"]}
    text = table(args, found, tools, failed)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    write_json(args.out / "results.json", {
        "schema": 1, "commit": args.commit, "rank": args.rank, "tools": tools,
        "versions": versions(), "failed": failed,
        "rows": [{"target": target, "merge": merge, **row} for (target, merge), row
                 in found.items()]})
    return [args.out / "results.json", args.out / "table.md"]


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "mergekit", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def table(args: argparse.Namespace, found: Mapping[tuple[str, str], Mapping[str, Any]],
          tools: Mapping[str, Mapping[str, Any]], failed: list[str]) -> str:
    from safety_trials.report import markdown

    lines = []
    order = sorted(found, key=lambda key: (key[0], key[1] != ALONE, key[1]))
    for target, merge in order:
        model, summary = (found[target, merge][key] for key in ("model", "summary"))
        loss = summary["losses"].get("prose", {}).get("loss")
        lines.append([target, merge, str(model["max_position_embeddings"]),
                      rate(summary["skills"].get("skill")),
                      *(by_length(summary, task) for task in ("passkey", "passkey-text")),
                      "" if loss is None else f"{loss:.3f}"])
    made = [[name, f"{row['seconds']:.1f} s", f"{row['bytes'] / 2**20:.2f} MiB",
             "yes" if row["ok"] else last_line(row["log"])] for name, row in tools.items()]
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    parts = [f"Rank {args.rank}; {known}; commit {args.commit}.\n",
             markdown(["target", "merge", "written length", "skill", "passkey in filler",
                       "passkey in text", "loss, prose"], lines),
             "\n## What the tools did\n", markdown(["made", "time", "weights", "done"], made)]
    if failed:
        parts += ["\n## What could not be measured\n", *(f"- {text}\n" for text in failed)]
    return "\n".join(parts)


def rate(entry: Mapping[str, Any] | None) -> str:
    from extend.results import format_rate

    return format_rate(entry) or ""


def by_length(summary: Mapping[str, Any], task: str) -> str:
    from extend.results import format_length

    lengths = summary["tasks"].get(task, {}).get("lengths", {})
    return ", ".join(f"{format_length(int(n))}: {rate(entry)}" for n, entry in lengths.items())


def last_line(log: str) -> str:
    return "failed: " + (log.strip().splitlines() or ["no message"])[-1].replace("|", "/")


def late(args: argparse.Namespace) -> bool:
    return args.deadline is not None and time.time() > args.deadline


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


STAGES: dict[str, tuple[Callable[[argparse.Namespace], Any], ...]] = {
    "all": (make, measure), "make": (make,), "measure": (measure,), "collect": ()}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [name for stage in STAGES[args.stage] for name in stage(args) or ()]
    for path in collect(args, failed):
        print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
