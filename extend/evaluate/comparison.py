"""Results of several models, put side by side: what the report shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from extend.results import Results, format_length, format_rate


@dataclass(frozen=True, slots=True)
class TableRow:
    """A line of the summary: label -> text, None where a model was not asked."""

    section: str
    measure: str
    cells: Mapping[str, str | None]


def grid_tasks(results: list[Results]) -> list[str]:
    """Names of the tasks with lengths and depths, in the order they first appear."""
    names = [name for result in results for name in result.data["summary"]["tasks"]]
    return list(dict.fromkeys(names))


def build_table(results: list[Results]) -> list[TableRow]:
    """Every line of the summary table."""
    return [*_grid_rows(results), *_effective_rows(results), *_control_rows(results),
            *_skill_rows(results), *_loss_rows(results)]


def _grid_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        entries = {r.label: _task(r, name).get("lengths", {}) for r in results}
        for length in sorted({int(n) for entry in entries.values() for n in entry}):
            yield TableRow(name, f"{name} at {format_length(length)}", {
                label: format_rate(entry.get(str(length))) for label, entry in entries.items()})


def _effective_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        yield TableRow("effective length", f"effective length, {name}", {
            r.label: _effective(_task(r, name)) for r in results})


def _effective(task: Mapping[str, Any]) -> str | None:
    return (format_length(task["effective_length"]) or "none") if task else None


def _control_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        controls = {r.label: _task(r, name).get("controls", {}) for r in results}
        for control in dict.fromkeys(key for entry in controls.values() for key in entry):
            yield TableRow("controls", f"{name}, {control}", {
                label: format_rate(entry.get(control)) for label, entry in controls.items()})


def _skill_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in _names(results, "skills"):
        yield TableRow("skills", name, {
            r.label: format_rate(r.data["summary"]["skills"].get(name)) for r in results})


def _loss_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in _names(results, "losses"):
        entries = {r.label: r.data["summary"]["losses"].get(name) for r in results}
        first = entries[results[0].label]
        window = next(e["length"] for e in entries.values() if e is not None)
        yield TableRow("loss", f"{name}, nats a token at {format_length(window)}", {
            label: format_loss(entry, None if entry is first else first)
            for label, entry in entries.items()})


def _names(results: list[Results], key: str) -> list[str]:
    return list(dict.fromkeys(n for r in results for n in r.data["summary"][key]))


def _task(result: Results, name: str) -> Mapping[str, Any]:
    return result.data["summary"]["tasks"].get(name, {})


def format_loss(entry: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> str | None:
    """A loss with its standard error and its change against the first model."""
    if entry is None:
        return None
    text = f"{entry['loss']:.3f}"
    if entry["stderr"] is not None:
        text += f" +/- {entry['stderr']:.3f}"
    if reference is not None:
        text += f" ({100 * (entry['loss'] / reference['loss'] - 1):+.2f} %)"
    return text


def to_markdown(labels: list[str], table: list[TableRow]) -> str:
    """The summary as a Markdown table."""
    head = ["measure", *labels]
    lines = [head, ["---"] * len(head)]
    lines += [[row.measure, *(row.cells[label] or "" for label in labels)] for row in table]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines) + "\n"


def _markdown_cell(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
