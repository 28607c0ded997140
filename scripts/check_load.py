#!/usr/bin/env python3
"""Load: what large and many things cost, checked against bounds.

    python scripts/check_load.py train --steps 10000
    python scripts/check_load.py eval --rows 100000
    python scripts/check_load.py merge --layers 80
    python scripts/check_load.py twice
    python scripts/check_load.py side-by-side --runs 10

Each writes its figures into docs/results/reliability/load.json and load.md, and exits with 1 where
a bound is broken. All run on a CPU; models are random and tiny, but for `merge`, which reads a
checkpoint of Llama-3.1-70B's shape from sparse files.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, not installed

from load_check import record  # noqa: E402


def _train(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    from load_check.training import check

    return check(work, args.steps)


def _eval(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    from load_check.evaluation import check

    return check(work, args.rows)


def _merge(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    from load_check.merging import check

    return check(work, args.shape, args.layers)


def _twice(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    from load_check.twice import check

    return check(work)


def _side_by_side(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str]]:
    from load_check.side_by_side import check

    return check(work, args.runs)


CHECKS: dict[str, Callable[[argparse.Namespace, Path], tuple[dict[str, Any], list[str]]]] = {
    "train": _train, "eval": _eval, "merge": _merge, "twice": _twice,
    "side-by-side": _side_by_side}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--steps", type=int, default=10_000, help="of train")
    parser.add_argument("--rows", type=int, default=100_000, help="of eval")
    parser.add_argument("--layers", type=int, default=80, help="of merge: how many hold data")
    parser.add_argument("--shape", default="70b", help="of merge: 70b or tiny")
    parser.add_argument("--runs", type=int, default=10, help="of side-by-side")
    parser.add_argument("--work", type=Path, help="where files are made; a temporary directory")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/reliability")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    said = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory(prefix="check-load-", dir=args.work) as work:
        figures, failures = CHECKS[args.check](args, Path(work))
    record.save(args.results, args.check, "python scripts/check_load.py " + shlex.join(said),
                figures, failures)
    for key, value in figures.items():
        print(f"{key}: {value}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
