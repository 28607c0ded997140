"""The loss curve of a training run, from its metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from extend.documents import read_json_lines
from extend.errors import CheckpointError

METRICS_NAME = "metrics.jsonl"
WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 36


@dataclass(frozen=True, slots=True)
class Curve:
    """What the page draws, in SVG units.

    Attributes:
        lines: (name, colour, points) of each curve.
        ticks_x, ticks_y: (position, text).
        marks: (x, text) where a new phase begins.
    """

    lines: Sequence[tuple[str, str, str]]
    ticks_x: Sequence[tuple[float, str]]
    ticks_y: Sequence[tuple[float, str]]
    marks: Sequence[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def read_curve(path: Path | str) -> Curve:
    """Read the curve of a checkpoint directory that `train` wrote, or of a metrics.jsonl.

    Raises:
        CheckpointError: no metrics there, or none with `step` and `nll`.
    """
    file = Path(path) / METRICS_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the output of `extend train`")
    records = [row for _, row in read_json_lines(file)]
    if not records or any(not isinstance(r.get("nll"), int | float) or
                          not isinstance(r.get("step"), int) for r in records):
        raise CheckpointError(f"{file}: holds no training metrics with step and nll in each line")
    return _layout(records)


def _layout(records: Sequence[Mapping[str, Any]]) -> Curve:
    answers = [r for r in records if isinstance(r.get("answer_nll"), int | float)]
    highest = max([r["nll"] for r in records] + [r["answer_nll"] for r in answers])
    first, last = records[0]["step"], max(records[-1]["step"], records[0]["step"] + 1)
    top = _round_up(highest)

    def x(step: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - value / top), 1)

    def points(rows: Sequence[Mapping[str, Any]], key: str) -> str:
        return " ".join(f"{x(r['step'])},{y(r[key])}" for r in rows)

    lines = [("all tokens", "#0072b2", points(records, "nll"))]
    if answers:
        lines.append(("answers", "#d55e00", points(answers, "answer_nll")))
    starts = [r for before, r in pairwise(records)
              if r.get("phase") != before.get("phase")]
    steps = [round(first + (last - first) * i / 4) for i in range(5)]
    return Curve(lines, [(x(s), f"{s:,}") for s in dict.fromkeys(steps)],
                 [(y(top * i / 4), f"{top * i / 4:.3g}") for i in range(5)],
                 [(x(r["step"]), f"phase {r.get('phase')}") for r in starts])


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(f * power for f in (1, 2, 4, 5, 8, 10) if f * power >= value)
