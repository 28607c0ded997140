"""Results of several models, put side by side: what the report shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from extend.evaluate.score import difference, difference_of_means
from extend.evaluate.summary import SINGLE_NEEDLE
from extend.evaluate.summary_text import reached
from extend.results import Results, format_length, format_rate


@dataclass(frozen=True, slots=True)
class TableRow:
    """A line of the summary: label -> text, None where a model was not asked."""

    section: str
    measure: str
    cells: Mapping[str, str | None]


def grid_tasks(results: list[Results]) -> list[str]:
    """Names of the tasks asked at several lengths, in the order they first appear."""
    names = [name for result in results for name in result.data["summary"]["tasks"]]
    return list(dict.fromkeys(names))


def build_table(results: list[Results]) -> list[TableRow]:
    """Every line of the summary table."""
    return [*_effective_rows(results), *_grid_rows(results), *_lost_rows(results),
            *_control_rows(results), *_skill_rows(results), *_loss_rows(results),
            *_shape_rows(results)]


def _grid_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        entries = {r.label: _task(r, name).get("lengths", {}) for r in results}
        for length in sorted({int(n) for entry in entries.values() for n in entry}):
            yield TableRow(name, f"{name} at {format_length(length)}", {
                label: format_rate(entry.get(str(length))) for label, entry in entries.items()})


def _effective_rows(results: list[Results]) -> Iterator[TableRow]:
    section = "effective length"
    for name in grid_tasks(results):
        yield TableRow(section, f"effective length, {name}", {
            r.label: _own(_task(r, name).get("own_rule")) for r in results})
    rules = {r.label: r.data["summary"]["effective_lengths"] for r in results}
    if len(grid_tasks(results)) > 1:
        yield TableRow(section, "effective length, the smallest of the tasks", {
            label: _reached(rule["own"]) for label, rule in rules.items()})
    if any(rule["ruler"] for rule in rules.values()):
        yield TableRow(section, "effective length, RULER's rule", {
            label: _ruler(rule["ruler"]) for label, rule in rules.items()})


def _lost_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        lost = {r.label: _lost(_task(r, name).get("lengths", {})) for r in results}
        if any(lost.values()):
            yield TableRow("lost answers", f"{name}, cut off and empty", lost)


def _own(rule: Mapping[str, Any] | None) -> str | None:
    """What a task's own rule gives, and the short score that it is relative to."""
    if rule is None:
        return None
    text = f"{reached(rule)} (by lower ends {format_length(rule['length_low']) or 'none'}; "
    short = f"{100 * rule['reference_score']:.3g} %"
    return text + f"own {short} at {format_length(rule['reference_length'])}, {rule['n']} prompts)"


def _reached(rule: Mapping[str, Any] | None) -> str | None:
    if rule is None:
        return None
    return (f"{format_length(rule['length']) or 'none'} (by lower ends "
            f"{format_length(rule['length_low']) or 'none'}; {rule['limited_by']})")


def _ruler(rule: Mapping[str, Any] | None) -> str | None:
    if rule is None:
        return None
    return (f"{reached(rule)} (by lower ends {format_length(rule['length_low']) or 'none'}; "
            f"{len(rule['tasks'])} of {rule['of']} tasks)")


def _lost(by_length: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The shares of the length where most are lost."""
    entries = [e for e in by_length.values() if "truncated" in e]
    if not entries:
        return None
    worst = max(entries, key=lambda e: e["truncated"] + e.get("empty", 0.0))
    return (f"{100 * worst['truncated']:.3g} %, {100 * worst.get('empty', 0.0):.3g} % "
            f"(of {worst['n']} at the worst length)")


def _control_rows(results: list[Results]) -> Iterator[TableRow]:
    for name in grid_tasks(results):
        controls = {r.label: _task(r, name).get("controls", {}) for r in results}
        for control in dict.fromkeys(key for entry in controls.values() for key in entry
                                     if key != SINGLE_NEEDLE):
            yield TableRow("controls", f"{name}, {control}", {
                label: format_rate(entry.get(control)) for label, entry in controls.items()})
        yield from _short_rows(results, name)
        checks = {r.label: _task(r, name).get("spot_check") for r in results}
        if any(checks.values()):
            yield TableRow("controls", f"{name}, spot check with one fact a prompt", {
                label: check and format_rate(check["single"]) for label, check in checks.items()})
            yield TableRow("controls", f"{name}, the stream at the same cells", {
                label: check and format_rate(check["stream"]) for label, check in checks.items()})


def _short_rows(results: list[Results], name: str) -> Iterator[TableRow]:
    """Every model where the first one is still within its own context."""
    first = results[0]
    within = [int(n) for n in _task(first, name).get("lengths", {}) if int(n) <= first.native_len]
    if len(results) > 1 and within:
        length = max(within)
        yield TableRow("controls", f"{name}, {format_length(length)} is within {first.label}'s "
                       "own context", {r.label: format_rate(_task(r, name).get("lengths", {}).get(
                           str(length))) for r in results})


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


def _shape_rows(results: list[Results]) -> Iterator[TableRow]:
    """Losses by position, and divergences from a reference."""
    for key, form, unit in (("curves", _slope, "nats each time the position doubles"),
                            ("divergences", _divergence, "KL in nats a token")):
        for name in _names(results, key):
            entries = {r.label: r.data["summary"][key].get(name) for r in results}
            yield TableRow("loss", f"{name}, {unit}", {
                label: entry and form(entry) for label, entry in entries.items()})


def _slope(entry: Mapping[str, Any]) -> str:
    if entry.get("slope_per_doubling") is None:
        return f"no slope (mean loss {entry['loss']:.3f})"
    over = "" if entry.get("short") is None else (
        f", {entry['excess']:+.3f} over windows of {format_length(entry['short'])}, whose slope it "
        "is")
    return (_with_error(entry["slope_per_doubling"], entry.get("slope_stderr"), "+")
            + f" (mean loss {entry['loss']:.3f}{over})")


def _divergence(entry: Mapping[str, Any]) -> str:
    text = _with_error(entry["kl"], entry.get("kl_stderr"))
    agreed = entry.get("agreement")
    return text if agreed is None else (
        f"{text} (same first choice at {100 * agreed:.2f} % of {entry['tokens']:,} tokens)")


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" +/- {error:.4f}")


def build_differences(results: list[Results]) -> list[TableRow]:
    """Every later model less the first one, in points with 95 % intervals; losses in nats."""
    first, others = results[0], results[1:]
    rows = []
    for name in grid_tasks(results) if others else []:
        base = _task(first, name).get("lengths", {})
        rows += [TableRow(name, f"{name} at {format_length(int(n))}", {
            r.label: _points(_task(r, name).get("lengths", {}).get(n), entry) for r in others})
            for n, entry in base.items()]
    for key, form in (("skills", _points), ("losses", _nats)):
        known = first.data["summary"][key] if others else {}
        rows += [TableRow(key, name, {
            r.label: form(r.data["summary"][key].get(name), entry) for r in others})
            for name, entry in known.items()]
    return rows


def _points(entry: Mapping[str, Any] | None, other: Mapping[str, Any]) -> str | None:
    if entry is None:
        return None
    gap, low, high = (100 * value for value in difference(entry, other))
    return f"{gap:+.3g} points ({low:+.0f} to {high:+.0f}; n = {entry['n']} and {other['n']})"


def _nats(entry: Mapping[str, Any] | None, other: Mapping[str, Any]) -> str | None:
    if entry is None or None in (entry["loss"], other["loss"]):
        return None
    gap, half = difference_of_means(entry["loss"], entry["stderr"], other["loss"], other["stderr"])
    spread = "" if half is None else f" ({gap - half:+.3f} to {gap + half:+.3f})"
    return f"{gap:+.3f} nats{spread}"


def _names(results: list[Results], key: str) -> list[str]:
    return list(dict.fromkeys(n for r in results for n in r.data["summary"][key]))


def _task(result: Results, name: str) -> Mapping[str, Any]:
    return result.data["summary"]["tasks"].get(name, {})


def format_loss(entry: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> str | None:
    """A loss with its standard error and its change against the first model."""
    if entry is None or entry["loss"] is None:
        return None
    text = f"{entry['loss']:.3f}"
    if entry["stderr"] is not None:
        text += f" +/- {entry['stderr']:.3f}"
    if reference is not None and reference["loss"]:
        text += f" ({100 * (entry['loss'] / reference['loss'] - 1):+.2f} %)"
    return text


def to_markdown(labels: list[str], table: list[TableRow], measure: str = "measure") -> str:
    """The summary as a Markdown table."""
    head = [measure, *labels]
    lines = [head, ["---"] * len(head)]
    lines += [[row.measure, *(row.cells[label] or "" for label in labels)] for row in table]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines) + "\n"


def _markdown_cell(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
