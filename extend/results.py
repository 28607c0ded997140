"""`results.json`, which `eval` writes and reports read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, RecipeError
from extend.manifest import hash_file
from extend.model_config import read_json

RESULTS_NAME = "results.json"
SCHEMA = 1
_LARGEST = 1e15  # of any number in a row: no length, count or loss comes near
_TEXTS, _NUMBERS = ("name", "task"), ("n", "actual_length", "correct")
_OPTIONAL = {"length": int, "depth": int | float, "score": int | float, "loss": int | float,
             "control": str}


@dataclass(frozen=True, slots=True)
class Results:
    """One `results.json`: its `label` in the report, its content and where it came from."""

    label: str
    path: Path
    sha256: str
    data: Mapping[str, Any]

    @property
    def native_len(self) -> int:
        """Raises CheckpointError where the results do not say it, as those of some servers."""
        length = self.data["model"].get("max_position_embeddings")
        if length is None:
            raise CheckpointError(f"{self.path}: model.max_position_embeddings is not known; run "
                                  "`extend eval` again, on a checkpoint or a server that tells it")
        return length

    def grid(self, name: str) -> list[Mapping[str, Any]]:
        """The rows of a task on a grid, without its controls."""
        return [row for row in self.data["rows"]
                if row["name"] == name and row["depth"] is not None and row["control"] is None]


def read_results(results: Mapping[str, Path | str]) -> list[Results]:
    """Read every results file.

    Args:
        results: label -> results.json, or the directory that holds it.

    Raises:
        RecipeError: no results.
        CheckpointError: a file is missing or of another format.
    """
    if not results:
        raise RecipeError("report: give at least one result as label -> path")
    return [_read(str(label), Path(path)) for label, path in results.items()]


def _read(label: str, path: Path) -> Results:
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the output of `extend eval`")
    data = read_json(path)
    keys = ("model", "rows", "summary")
    if data.get("schema") != SCHEMA or any(key not in data for key in keys):
        raise CheckpointError(f"{path}: is not results of schema {SCHEMA} with {', '.join(keys)}; "
                              "run `extend eval` with this version")
    problem = _problem(data)
    if problem:
        raise CheckpointError(f"{path}: {problem}; it was changed since it was written, run "
                              "`extend eval` again")
    return Results(label, path, hash_file(path), data)


def _problem(data: Mapping[str, Any]) -> str | None:
    """What keeps results from being results, None for good ones."""
    model, rows, summary = data["model"], data["rows"], data["summary"]
    if not isinstance(model, dict) or not isinstance(summary, dict) or not isinstance(rows, list):
        return "model and summary are objects and rows is a list, but these are not"
    context = model.get("max_position_embeddings")
    if context is not None and (type(context) is not int or not 0 < context < _LARGEST):
        return f"model.max_position_embeddings is {str(context)[:80]!r}, not a length"
    if not isinstance(summary.get("tasks", {}), dict):
        return "summary.tasks is not an object"
    return next((f"rows[{number}]: {problem}" for number, row in enumerate(rows)
                 if (problem := _row_problem(row))), None)


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in _TEXTS):
        return "is not an object with a name and a task"
    for key, kind in _OPTIONAL.items():
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            return f"{key} is {str(value)[:80]!r}"
    for key, value in row.items():
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{key} is {str(value)[:80]!r}, not a number"
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:
            return f"{key} is {str(value)[:80]}, which is not finite or too large"
    if row.get("score") is not None and not row.get("n", 0) > 0:
        return f"n is {row.get('n')!r} beside a score"
    return None


@contextmanager
def reading_rows(results: Sequence[Results]) -> Iterator[None]:
    """Turn what the block meets in rows of another form into one clear error.

    Raises:
        CheckpointError: results whose rows do not hold what their task measures.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"{', '.join(str(r.path) for r in results)}: the rows are not those of an evaluation "
            f"({type(error).__name__}: {error}); run `extend eval` again") from error


def format_length(tokens: int) -> str:
    """131072 as `128K`; lengths that are no multiple of 1024 in full; nothing for 0."""
    for unit, name in ((1024 ** 2, "M"), (1024, "K")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}" if tokens else ""


def format_rate(entry: Mapping[str, Any] | None) -> str | None:
    """A share with its n and its Wilson interval, never without: `98 % (49/50; 90-100)`.

    A mean of grades says `83.2 % (n = 50; 71-91)` instead: no whole number of answers was right.
    """
    if entry is None:
        return None
    points = entry["score"] * entry["n"]
    in_parts = "truncated" in entry or "tasks" in entry  # answers with grades, or a mean of tasks
    whole = not in_parts and abs(points - round(points)) < 1e-3
    count = f"{round(points)}/{entry['n']}" if whole else f"n = {entry['n']}"
    low, high = round(100 * entry["wilson_low"]), round(100 * entry["wilson_high"])
    return f"{100 * entry['score']:.3g} % ({count}; {low}-{high})"
