"""From rows to the numbers at the top: score by length, effective length, skills, losses."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from extend.evaluate.effective import (
    OWN_RULE,
    RULER_THRESHOLD,
    own_rule,
    ruler_rule,
    smallest,
)
from extend.evaluate.loss_summary import summarize_losses
from extend.evaluate.score import proportion
from extend.evaluate.tasks.task import NO_CONTEXT, NO_NEEDLE
from extend.results import format_length, format_rate

MOST_LOST = 0.05  # share of answers cut off or empty above which the page warns
_RULER = "ruler"  # how the names of RULER's tasks begin
_STREAM = "-stream"  # how the names of streaming grids end
_LEAKS = (NO_NEEDLE, NO_CONTEXT)
SINGLE_NEEDLE = "single-needle"
_SHARES = ("truncated", "empty")

Row = Mapping[str, Any]


def summarize(rows: Sequence[Row], chances: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The `summary` of results.json; trials are pooled over depths.

    Args:
        chances: name of a task -> the score of guessing.
    """
    graded = [row for row in rows if row["score"] is not None]
    tasks = {name: _summarize_grid(group, (chances or {}).get(name)) for name, group in _by_name(
        row for row in graded if row["length"] is not None)}
    grids = {name: task for name, task in tasks.items() if task["lengths"]}
    for name, task in tasks.items():
        if task["stream"]:
            task["spot_check"] = _spot_check(name, graded)
    own = smallest({name: task["own_rule"] for name, task in grids.items()})
    ruler = ruler_rule({name: task["lengths"] for name, task in grids.items()
                        if task["task"].startswith(_RULER)})
    return {"effective_length": None if own is None else own["length"],
            "effective_length_rule": OWN_RULE, "effective_lengths": {"own": own, "ruler": ruler},
            "tasks": tasks,
            "skills": {row["name"]: _share_of(row) for row in graded if row["length"] is None},
            **summarize_losses(rows), "warnings": _warnings(tasks)}


def _by_name(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    return list(groups.items())


def _summarize_grid(rows: Sequence[Row], chance: float | None) -> dict[str, Any]:
    lengths: dict[int, list[Row]] = {}
    controls: dict[str, list[Row]] = {}
    for row in rows:
        if row["control"] is None:
            lengths.setdefault(row["length"], []).append(row)
        else:
            controls.setdefault(row["control"], []).append(row)
    by_length = {str(length): {**_pool(group), "beyond_native": group[0]["beyond_native"]}
                 for length, group in sorted(lengths.items())}
    rule = own_rule(by_length, chance) if by_length else None
    return {"task": rows[0]["task"], "effective_length": rule and rule["length"],
            "own_rule": rule, "chance": chance,
            "stream": any(row.get("stream", False) for row in rows), "lengths": by_length,
            "controls": {name: {"length": min(row["length"] for row in group), **_pool(group)}
                         for name, group in controls.items()}}


def _spot_check(name: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """A streaming grid beside prompts with one fact, at the cells that both were asked at."""
    stream = {(row["length"], row["depth"]): row for row in rows
              if row["name"] == name and row["control"] is None}
    kinds = {row["task"].removesuffix(_STREAM) for row in stream.values()}
    single = [row for row in rows if (row["length"], row["depth"]) in stream and (
        (row["control"] is None and row["name"] != name and row["task"] in kinds)
        or (row["name"] == name and row["control"] == SINGLE_NEEDLE))]
    if not single:
        return None
    places = dict.fromkeys((row["length"], row["depth"]) for row in single)
    return {"cells": len(places), "single": _pool(single),
            "stream": _pool([stream[place] for place in places])}


def _pool(rows: Sequence[Row]) -> dict[str, Any]:
    """The score over all prompts of several rows; cut off and empty answers where they can be."""
    n = sum(row["n"] for row in rows)
    lost = {key: round(sum(row[key] * row["n"] for row in rows) / n, 6)
            for key in _SHARES if all(row.get(key) is not None for row in rows)}
    return {**proportion(sum(map(_points, rows)), n), **lost}


def _points(row: Row) -> float:
    """The sum of a row's grades; its score is rounded."""
    points = row["score"] * row["n"]
    return row["correct"] if abs(points - row["correct"]) < 1e-3 else round(points, 4)


def _share_of(row: Row) -> dict[str, Any]:
    keys = ("score", "n", "wilson_low", "wilson_high")
    return {key: row[key] for key in (*keys, *_SHARES) if row.get(key) is not None or key in keys}


def _warnings(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a score, in sentences."""
    found = []
    for name, task in tasks.items():
        found += _lost(name, task["lengths"])
        found += [f"{name}, {control}: {format_rate(entry)} is above chance, "
                  f"{format_chance(task['chance'])}: answers leak or can be guessed"
                  for control, entry in task["controls"].items()
                  if control in _LEAKS and task["chance"] is not None
                  and entry["wilson_low"] > task["chance"]]
        found += _doubts(name, task) if task["own_rule"] else []
    return found


def _doubts(name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """Why the length by a task's own short score may mean little."""
    rule = task["own_rule"]
    first = task["lengths"][str(rule["reference_length"])]
    where = f"{format_length(rule['reference_length'])}, the shortest length asked,"
    if not rule["above_chance"]:
        yield f"{name}: its score at {where} is not surely above chance, so no length counts"
    elif rule["reference_score"] < RULER_THRESHOLD:
        yield (f"{name}: the score at {where} is only {format_rate(first)}, and the effective "
               "length says no more than up to where it holds")
    if first["beyond_native"]:
        yield (f"{name}: {where} is beyond the model's own context, so what it should reach is "
               "not known")


def _lost(name: str, by_length: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    texts = {"truncated": "cut off before they ended: more room for them may raise the score",
             "empty": "empty"}
    for key in _SHARES:
        bad = {length: e for length, e in by_length.items() if e.get(key, 0.0) > MOST_LOST}
        if bad:
            worst = max(bad.values(), key=lambda entry: entry[key])
            places = ", ".join(format_length(int(length)) for length in bad)
            yield (f"{name} at {places}: {100 * worst[key]:.3g} % of {worst['n']} answers"
                   f"{' at the worst' if len(bad) > 1 else ''} are {texts[key]}")


def format_chance(chance: float | None) -> str:
    """The score of guessing, in words."""
    if chance is None:
        return "not stated"
    return f"{100 * chance:.2g} %"
