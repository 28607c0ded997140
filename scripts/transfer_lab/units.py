"""Do the units of work: row by row, written after each, so that a run goes on where one stopped."""

import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extend.output import write_json

from .bench import Bench, Case, Change
from .claims import Clock, claim
from .plan import ALONE, Level, Unit, list_units, say
from .recipes import GROUPS, Make


class OutOfTime(Exception):
    """The next row would end after the deadline."""


def unit_rows(unit: Unit) -> list[str]:
    return [ALONE] if unit.group == "alone" else list(GROUPS[unit.group])


def unit_path(out: Path, unit: Unit) -> Path:
    return out / "units" / unit.file


def read_unit(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def is_done(out: Path, unit: Unit) -> bool:
    path = unit_path(out, unit)
    done = {row["merge"] for row in read_unit(path)["rows"]} if path.exists() else set()
    return done.issuperset(unit_rows(unit))


def open_units(level: Level, out: Path, groups: set[str] | None) -> Iterator[Unit]:
    """Units that are not done, most telling first, each given to one process."""
    for unit in list_units(level):
        wanted = groups is None or unit.group in groups
        if wanted and not is_done(out, unit) and claim(out, unit.file):
            yield unit


def run_units(bench: Bench, clock: Clock, groups: set[str] | None) -> None:
    """Do units until there are none, or no time for the next row.

    A unit that fails is told with its traceback, and the others are done all the same.

    Raises:
        SystemExit: at the end, when units failed or lack a model.
    """
    left_out = []
    for unit in open_units(bench.level, bench.out, groups):
        missing = missing_models(bench, unit)
        if missing:
            left_out.append(f"{unit.name} ({' and '.join(missing)} not trained)")
            continue
        try:
            run_unit(bench, unit, clock)
        except OutOfTime:
            say(f"{unit.name}: time is up")
            break
        except Exception:
            traceback.print_exc()
            left_out.append(f"{unit.name} (error above)")
    if left_out:
        raise SystemExit(f"units left out: {'; '.join(left_out)}")


def missing_models(bench: Bench, unit: Unit) -> list[str]:
    files = [] if unit.long == ALONE else [bench.long_folder(unit.long)]
    if unit.target.skill is not None:
        files.append(bench.target_file(unit.target))
    return [str(path) for path in files if not path.exists()]


def run_unit(bench: Bench, unit: Unit, clock: Clock) -> None:
    """The rows of a unit that are not there yet."""
    path = unit_path(bench.out, unit)
    found = read_unit(path) if path.exists() else {
        "schema": 1, "group": unit.group, "target": unit.target.name,
        "skill_name": unit.target.skill, "steps": unit.target.steps, "long": unit.long,
        "about": bench.about(), "rows": []}
    path.parent.mkdir(exist_ok=True)
    done = {row["merge"] for row in found["rows"]}
    for name in unit_rows(unit):
        if name in done:
            continue
        expected = seconds_of(bench.level, unit.group)
        if not clock.has(expected):
            raise OutOfTime
        begin = time.perf_counter()
        case = bench.enter(unit.target, unit.long)
        row = alone(case) if unit.group == "alone" else merged(case, GROUPS[unit.group][name],
                                                               lengths(bench.level, unit.group))
        seconds = time.perf_counter() - begin
        clock.learn(expected, seconds)
        found["rows"].append({"merge": name, **row, "seconds": seconds})
        write_json(path, found)
        say(f"{unit.name}, {name}: {brief(row)}, {seconds:.1f} s")


def seconds_of(level: Level, group: str) -> float:
    """What a row is expected to take; the units' own preparation is spread over their rows."""
    far = sum((length / level.length) ** 2 for length in level.far) / 2
    learning = 5.0
    return level.row_seconds * {"learned": learning, "learned-other": learning,
                                "far": 1 + far}.get(group, 1.0)


def lengths(level: Level, group: str) -> tuple[int, ...]:
    return (level.length, *level.far) if group == "far" else (level.length,)


def alone(case: Case) -> dict[str, Any]:
    """The target as it is, in its native length and beyond."""
    bench = case.bench
    bench.put_native(case.target)
    drift = bench.subject.drift(case.own_delta)
    return {**case.measure((bench.native.original_len, bench.level.length)),
            "numbers": {"target_drift": drift}}


def merged(case: Case, make: Make, at: tuple[int, ...]) -> dict[str, Any]:
    change: Change = make(case)
    with case.bench.merged(case, change) as numbers:
        return {**case.measure(at), "numbers": numbers}


def brief(row: dict[str, Any]) -> str:
    skill = row["skill"]
    keys = "; ".join(f"{length}: {' + '.join(str(found['right']) for found in kinds.values())}"
                     for length, kinds in row["passkey"].items())
    own = f"skill {skill['right']}/{skill['n']}, KL {skill['kl']:.3f}, " if skill else ""
    return f"{own}text KL {row['text']['kl']:.3f}, passkeys {keys}"

