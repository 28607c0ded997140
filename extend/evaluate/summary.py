"""From rows to the numbers at the top: score by length, effective length, skills, losses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from extend.evaluate.loss_summary import summarize_losses
from extend.evaluate.score import proportion

PASSING = 0.85
EFFECTIVE_LENGTH_RULE = (
    f"the largest length at which a task's mean score is at least {PASSING:g}, all shorter lengths "
    "included; over several tasks the smallest of theirs; 0 when the shortest length fails")

Row = Mapping[str, Any]


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The `summary` of results.json; trials are pooled over depths."""
    tasks = {name: _summarize_grid(group) for name, group in _by_name(
        row for row in rows if row["length"] is not None and row["score"] is not None)}
    skills = {row["name"]: _proportion_of(row) for row in rows
              if row["length"] is None and row["score"] is not None}
    effective = [task["effective_length"] for task in tasks.values()]
    return {"effective_length": min(effective) if effective else None,
            "effective_length_rule": EFFECTIVE_LENGTH_RULE,
            "tasks": tasks, "skills": skills, **summarize_losses(rows)}


def _by_name(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    return list(groups.items())


def _summarize_grid(rows: Sequence[Row]) -> dict[str, Any]:
    lengths: dict[int, list[Row]] = {}
    for row in rows:
        if row["control"] is None:
            lengths.setdefault(row["length"], []).append(row)
    by_length = {str(length): {**proportion(sum(r["correct"] for r in group),
                                            sum(r["n"] for r in group)),
                               "beyond_native": group[0]["beyond_native"]}
                 for length, group in sorted(lengths.items())}
    controls = {row["control"]: {"length": row["length"], **_proportion_of(row)}
                for row in rows if row["control"] is not None}
    return {"task": rows[0]["task"], "effective_length": effective_length(by_length),
            "lengths": by_length, "controls": controls}


def _proportion_of(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("score", "n", "wilson_low", "wilson_high")}


def effective_length(by_length: Mapping[str, Mapping[str, Any]]) -> int:
    """Apply EFFECTIVE_LENGTH_RULE to one task; `by_length` is in ascending order."""
    reached = 0
    for length, entry in by_length.items():
        if entry["score"] < PASSING:
            break
        reached = int(length)
    return reached
