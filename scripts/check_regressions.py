#!/usr/bin/env python3
"""Measure exactness and speed again, and compare with what is recorded: exits 1 on a regression.

    python scripts/check_regressions.py                 # everything, about 20 minutes on 2 cores
    python scripts/check_regressions.py --only rope,help
    python scripts/check_regressions.py --record        # what is measured becomes what is recorded

Recorded values lie in docs/results/reliability/recorded.json, each with its tolerance, the machine
and the commit. Exactness is compared on every machine; a speed only on the machine of that name,
and elsewhere it is told. Times are CPU seconds of the whole command, the best of its rounds, which
other work on the machine changes least. Where there is a GPU, a section of it is added.
"""

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, not installed

from load_check.record import commit, hardware  # noqa: E402
from regressions.measure import SECTIONS, Value  # noqa: E402

RECORDED = ROOT / "docs/results/reliability/recorded.json"


def compare(values: Mapping[str, Value], recorded: Mapping[str, Mapping[str, Any]],
            machine: str) -> tuple[list[str], list[str]]:
    """A line for every value, and those that are regressions."""
    lines, regressions = [], []
    for name, value in values.items():
        known = recorded.get(name)
        if known is None:
            lines.append(f"{name}: {value.text()}, not recorded yet")
            continue
        limit = value.limit(known["value"])
        line = (f"{name}: {value.text()}, recorded {known['value']:.4g}, "
                f"{'at least' if value.more_is_better else 'at most'} {limit:.4g}")
        if value.is_speed and known["machine"] != machine:
            lines.append(f"{line}; not compared, recorded on {known['machine']}")
        elif value.is_worse_than(limit):
            regressions.append(f"{line}: REGRESSION")
            lines.append(regressions[-1])
        else:
            lines.append(line)
    return lines, regressions


def measure(names: list[str], failures: list[str]) -> dict[str, Value]:
    """The values of some sections; one that fails is told, and the others go on."""
    values: dict[str, Value] = {}
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix="check-regressions-") as work:
                values |= SECTIONS[name](Path(work))
        except Exception:
            failures.append(f"{name}: cannot be measured:\n{traceback.format_exc()}")
    return values


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"by comma, of {', '.join(SECTIONS)}")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    args = parser.parse_args(arguments)
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(SECTIONS)
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    failures: list[str] = []
    values, machine = measure(names, failures), hardware()
    recorded = json.loads(args.recorded.read_text()) if args.recorded.is_file() else {}
    lines, regressions = compare(values, recorded, machine)
    print("\n".join([*lines, *failures]))
    if args.record:
        stamp = {"machine": machine, "commit": commit(),
                 "when": datetime.now(UTC).isoformat(timespec="seconds")}
        recorded |= {name: {**value.to_json(), **stamp} for name, value in values.items()}
        args.recorded.parent.mkdir(parents=True, exist_ok=True)
        args.recorded.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
        return 1 if failures else 0
    return 1 if regressions or failures else 0


if __name__ == "__main__":
    sys.exit(main())
