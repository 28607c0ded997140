"""What a doctor found, as an object, as JSON and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extend.adapter_format.serving import ServingVerdict
from extend.doctor.findings import ERROR, Finding
from extend.doctor.reading import FULL, Reading

_HEADINGS = ("reader", "theta", "inv_freq", "attention", "max length")


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The result of an examination.

    Attributes:
        directory: what was looked at.
        architecture: of the model.
        readings: one for each engine.
        agreeing: names of engines that read alike, one list for each way of reading.
        findings: problems, the worst first.
        questions: what only the user can decide before a fix.
        changes: what a fix would change (or has changed): `file: key` to `before -> after`.
        output: what a fix has written, or None.
        serving: of an adapter, what each serving engine makes of its files.
    """

    directory: Path
    architecture: str
    readings: tuple[Reading, ...]
    agreeing: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]
    questions: tuple[str, ...] = ()
    changes: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    serving: tuple[ServingVerdict, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == ERROR)

    @property
    def ok(self) -> bool:
        """Whether all current engines compute the same, and nothing is left to decide."""
        return not self.errors and not self.questions

    @property
    def complaint(self) -> str:
        """One line for standard error; "" when `ok`."""
        if self.ok:
            return ""
        parts = []
        if self.errors:
            parts.append(f"{_count(len(self.errors), 'error')} "
                         f"({', '.join(dict.fromkeys(f.what for f in self.errors))})")
        if self.questions:
            parts.append(f"{_count(len(self.questions), 'question')} to decide")
        return f"{self.directory}: does not pass: {', '.join(parts)}; see the report"

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "directory": str(self.directory),
                "architecture": self.architecture,
                "readers": {r.reader: r.to_json() for r in self.readings},
                "agree": [list(names) for names in self.agreeing],
                "findings": [f.to_json() for f in self.findings],
                "questions": list(self.questions), "changes": dict(self.changes),
                "output": None if self.output is None else str(self.output),
                "serving": {v.engine: v.to_json() for v in self.serving}}

    def to_text(self) -> str:
        """A table of readings, which of them agree, then the findings."""
        lines = [f"{self.directory}: {self.architecture}", ""]
        if self.readings:
            lines += [*_table(self.readings), "", *_agreement_lines(self.agreeing, self.readings)]
        if self.serving:
            lines += [*([""] if self.readings else []), *_serving_table(self.serving)]
        for finding in self.findings:
            about = f" [{', '.join(finding.readers)}]" if finding.readers else ""
            lines += ["", f"{finding.severity}: {finding.what}{about}", f"  {finding.message}"]
            lines += [f"  -> {finding.remedy}"] if finding.remedy else []
        for question in self.questions:
            lines += ["", f"to decide: {question}"]
        if self.output is not None:
            lines += ["", f"written: {self.output}"]
            lines += [f"  {key}: {change}" for key, change in self.changes.items()]
        elif self.errors and any(f.avoidable for f in self.errors) and self.changes:
            stays = any(not f.avoidable for f in self.errors)
            lines += ["", "the portable form would change:" if stays else "--fix would change:"]
            lines += [f"  {key}: {change}" for key, change in self.changes.items()]
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(readings: Sequence[Reading]) -> list[str]:
    """One row for each reader, and one more for each further layer type."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for reading in readings:
        if reading.refusal or reading.unknown:
            rows.append((reading.reader, "refuses" if reading.refusal else "not known"))
            continue
        for name in sorted(reading.layers, key=lambda layer: layer != FULL):
            layer = reading.layers[name]
            label = reading.reader if name == FULL else f"  {name}"
            rows.append((label, f"{layer.parameters['rope_theta']:.12g}", layer.sha,
                         f"{layer.attention_factor:.6g}",
                         str(reading.max_len) if name == FULL else ""))
    return _align(rows)


def _serving_table(serving: Sequence[ServingVerdict]) -> list[str]:
    rows = [("served by", "version", "verdict", "--max-lora-rank")]
    rows += [(v.engine, v.version, v.verdict, str(v.max_rank or "none is enough"))
             for v in serving]
    return _align(rows)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows]


def _agreement_lines(agreeing: Sequence[Sequence[str]], readings: Sequence[Reading]) -> list[str]:
    if len(agreeing) == 1:
        lines = [f"agree: {', '.join(agreeing[0])}"]
    else:
        lines = [f"{'agree' if len(names) > 1 else 'alone'}: {', '.join(names)}"
                 for names in agreeing]
    for reading in readings:
        if reading.unknown:
            lines.append(f"not known: {reading.reader}: {reading.unknown}")
    return lines
