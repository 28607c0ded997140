"""Fuzz every parser of files and names from outside, guided by coverage, and record it.

    pip install atheris
    python scripts/fuzz.py --runs 1000000        # all targets, into docs/results/reliability
    python scripts/fuzz.py --target header --runs 50000 --out /tmp/fuzz

Each target of `scripts/fuzzing/targets.py` runs in a process of its own. An input may be read or
refused with an ExtendError; any other exception, more than 10 seconds or more than 2 GiB is a
fault, and its input is kept in OUT/crashes. Put it into tests/fuzz_seeds/TARGET once it is mended:
the suite tries all that lie there.
"""

import argparse
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "docs" / "results" / "reliability"
# Parts of 1000 of all runs; what takes longer for an input gets fewer.
SHARES = {"header": 250, "names": 300, "config": 120, "vocabulary": 150, "lines": 90,
          "manifest": 30, "index": 20, "results": 20, "adapter": 10, "sidecar": 10, "gguf": 10,
          "card": 10, "overrides": 3, "recipe": 0.5}
SECONDS, MEMORY_MIB, LONGEST = 10, 2048, 1 << 14


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of all targets")
    parser.add_argument("--seconds", type=float, default=0.0,
                        help="end after about this long, also with fewer inputs")
    parser.add_argument("--target", action="append", choices=list(SHARES), help="only this")
    parser.add_argument("--jobs", type=int, default=2, help="targets at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where fuzz.json and fuzz.md go")
    parser.add_argument("--join", type=Path, action="append",
                        help="run nothing: put what other runs recorded into one record")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return _work(options)
    if options.join:
        return _join(options)
    chosen = options.target or list(SHARES)
    total = sum(SHARES[name] for name in chosen)
    runs = {name: 1 + int(options.runs * SHARES[name] / total) for name in chosen}
    seconds = {name: options.seconds * options.jobs * SHARES[name] / total for name in chosen}
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: _fuzz(
            name, runs[name], seconds[name], options), chosen))
    _record(options, rows, time.monotonic() - began)
    return int(any(row["faults"] for row in rows))


def _fuzz(name: str, runs: int, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one target in a process; say what came of it."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as work:
        began = time.monotonic()
        command = [sys.executable, __file__, "--target", name, "--runs", str(runs), "--seed",
                   str(options.seed), "--work", work, "--seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              check=False)
        took = time.monotonic() - began
        faults = sorted((Path(work) / "faults").glob("*"))
        for fault in faults:
            (options.out / "crashes" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(fault, options.out / "crashes" / name / fault.name)
        counts = Path(work) / "counts.json"
        row = {"target": name, **(json.loads(counts.read_text()) if counts.exists() else {}),
               "seconds": round(took, 1), **_statistics(done.stderr),
               "faults": len(faults) or int(done.returncode != 0)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    if row["faults"]:
        print(done.stderr[-3000:], file=sys.stderr)
    return row


def _statistics(told: str) -> dict[str, int]:
    """What libFuzzer says in the end."""
    found = {key: int(match[-1]) for key, pattern in {
        "inputs": r"stat::number_of_executed_units:\s*(\d+)",
        "peak_mib": r"stat::peak_rss_mb:\s*(\d+)",
        "slowest_seconds": r"stat::slowest_unit_time_sec:\s*(\d+)",
        "edges": r"\bcov: (\d+)", "features": r"\bft: (\d+)", "kept_inputs": r"\bcorp: (\d+)",
        "edges_of_seeds": r"INITED cov: (\d+)",
    }.items() if (match := re.findall(pattern, told))}
    return found


def _work(options: argparse.Namespace) -> int:
    """The process of one target; does not return while all is well."""
    import atheris

    with atheris.instrument_imports(include=["extend"]):
        from scripts.fuzzing.targets import TARGETS, clean
    from extend.errors import ExtendError
    from scripts.fuzzing.mutate import mutate
    from scripts.fuzzing.seeds import seeds_of

    logging.disable(logging.CRITICAL)
    name, work = options.target[0], options.work
    target, folder, corpus = TARGETS[name], work / "input", work / "corpus"
    for place in (folder, corpus, work / "faults"):
        clean(place)
    for number, seed in enumerate(seeds_of(name)):
        (corpus / f"seed-{number}").write_bytes(seed[:LONGEST])
    counts, chance = {"read": 0, "refused": 0}, random.Random(options.seed)

    def once(data: bytes) -> None:
        try:
            target(data, folder)
            counts["read"] += 1
        except ExtendError:
            counts["refused"] += 1
        done = sum(counts.values())
        if done % 2000 == 0 or done >= options.runs:
            (work / "counts.json").write_text(json.dumps(counts))

    def change(data: bytes, most: int, seed: int) -> bytes:
        if chance.random() < 0.5:
            return mutate(data, chance, most)
        return atheris.Mutate(data, most)

    arguments = [sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed}",
                 f"-max_len={LONGEST}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY_MIB}",
                 f"-artifact_prefix={work / 'faults'}/", "-print_final_stats=1", str(corpus)]
    if options.seconds:
        arguments.insert(1, f"-max_total_time={max(1, round(options.seconds))}")
    atheris.Setup(arguments, once, custom_mutator=change)
    atheris.Fuzz()
    return 0


def _join(options: argparse.Namespace) -> int:
    """One record of several runs."""
    records = [json.loads((place / "fuzz.json").read_text()) for place in options.join]
    options.commit = ", ".join(sorted({record["commit"] for record in records}))
    options.jobs = sum(record["jobs"] for record in records)
    _record(options, [row for record in records for row in record["targets"]],
            max(record["seconds"] for record in records))
    return 0


def _record(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> None:
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty",
                             "--abbrev=12"], capture_output=True, text=True, check=False)
    order = list(SHARES)
    rows = sorted(rows, key=lambda row: order.index(row["target"]))
    inputs = sum(row.get("inputs", 0) for row in rows)
    record = {"schema": 1, "command": f"python scripts/fuzz.py --runs {options.runs:.0f}",
              "commit": getattr(options, "commit", None) or commit.stdout.strip(),
              "python": sys.version.split()[0],
              "seed": options.seed, "jobs": options.jobs, "inputs": inputs,
              "faults": sum(row["faults"] for row in rows), "seconds": round(seconds, 1),
              "limits": {"seconds": SECONDS, "memory_mib": MEMORY_MIB, "bytes": LONGEST},
              "targets": rows}
    (options.out / "fuzz.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        "# Fuzzing", "",
        f"{inputs:,} inputs in {seconds:,.0f} s, {record['faults']} faults: "
        f"`{record['command']}` at commit `{record['commit']}`, Python {record['python']}, atheris "
        f"(coverage of this package's code), {options.jobs} targets at once. An input of at most "
        f"{LONGEST:,} bytes is read or refused with an `ExtendError` within {SECONDS} s and "
        f"{MEMORY_MIB:,} MiB; anything else is a fault.", "",
        "| target | inputs | read | refused | edges (of the seeds) | kept inputs | slowest, s | "
        "peak, MiB | faults |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append("| " + " | ".join([
            row["target"], *(f"{row.get(key, 0):,}" for key in ("inputs", "read", "refused")),
            f"{row.get('edges', 0):,} ({row.get('edges_of_seeds', 0):,})",
            *(f"{row.get(key, 0):,}" for key in ("kept_inputs", "slowest_seconds", "peak_mib",
                                                 "faults"))]) + " |")
    (options.out / "fuzz.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
