"""The course of a training run, from its metrics.jsonl: data once, for a picture and for a page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from extend.documents import read_json_lines
from extend.errors import CheckpointError
from extend.page.chart import PALETTE, Chart, stretch, thin

METRICS_NAME = "metrics.jsonl"
PICTURE_NAME = "training.png"
_MOST_POINTS = 2000  # more than a picture has columns
_LABEL_SHARE = 0.12  # of a picture's width, which the name of a phase takes


@dataclass(frozen=True, slots=True)
class Curve:
    """What was measured at each step.

    Attributes:
        points: (step, value).
    """

    name: str
    color: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Course:
    """Curves of one unit over the steps of a run.

    Attributes:
        phases: (step, number) at which each phase but the first begins.
        from_zero: whether the axis of values begins at 0.
        stretch: steps of which the lowest and the highest value are drawn; 1: every step is.
    """

    title: str
    curves: Sequence[Curve]
    phases: Sequence[tuple[int, int]]
    from_zero: bool
    stretch: int = 1

    @property
    def x_range(self) -> tuple[int, int]:
        steps = [step for curve in self.curves for step, _ in curve.points]
        return min(steps), max(max(steps), min(steps) + 1)

    @property
    def y_range(self) -> tuple[float, float]:
        values = [value for curve in self.curves for _, value in curve.points]
        low, high = (0.0 if self.from_zero else min(values)), max(values)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return (low if self.from_zero else low - room), high + room

    def chart(self) -> Chart:
        """The same for the page."""
        chart = Chart(self.title, "step", self.x_range, self.y_range)
        for step, number in self.phases:
            chart.mark_x(step, f"phase {number}", "var(--soft)")
        for number, curve in enumerate(self.curves):  # the third may lie on the first
            chart.add(curve.name, curve.color, curve.points, dashed=number > 1)
        return chart


def _gib(value: float) -> float:
    return value / 2**30


def _plain(value: float) -> float:
    return value


def _percent(value: float) -> float:
    return 100 * value


# Title, whether from 0, what is drawn (key of a line, name), and in what unit.
_COURSES: tuple[tuple[str, bool, dict[str, str], Callable[[float], float]], ...] = (
    ("loss, nats a token", False,
     {"nll": "all tokens", "answer_nll": "answers", "loss": "trained on",
      "divergence": "divergence"}, _plain),
    ("learning rate", True, {"lr": "learning rate"}, _plain),
    ("norm of the gradient", True, {"grad_norm": "before clipping"}, _plain),
    ("tokens a second", True, {"tokens_per_second": "all processes",
                               "tokens_per_second_per_gpu": "each process"}, _plain),
    ("MFU, %", True, {"mfu": "MFU"}, _percent),
    ("memory, GiB", True, {"peak_memory_bytes": "largest process",
                           "host_memory_bytes": "largest host"}, _gib))


def read_courses(path: Path | str, most_points: int = _MOST_POINTS) -> list[Course]:
    """Read the course of a checkpoint directory that `train` wrote, or of a metrics.jsonl.

    What no step has measured is left out.

    Args:
        most_points: of a curve; of more steps the lowest and the highest of every stretch are kept.

    Raises:
        CheckpointError: no metrics there, or some without `step` and `nll`.
    """
    file = Path(path) / METRICS_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the output of `extend train`")
    records = [row for _, row in read_json_lines(file) if not row.get("skipped")]
    if not records or any(not isinstance(r.get("nll"), int | float) or
                          not isinstance(r.get("step"), int) for r in records):
        raise CheckpointError(f"{file}: holds no training metrics with step and nll in each line")
    phases = [(now["step"], now["phase"]) for before, now in pairwise(records)
              if now.get("phase") != before.get("phase")]
    found = [Course(title, _curves(records, names, unit, most_points), phases, from_zero,
                    stretch(len(records), most_points))
             for title, from_zero, names, unit in _COURSES]
    return [course for course in found if course.curves]


def _curves(records: Sequence[Mapping[str, Any]], names: Mapping[str, str],
            unit: Callable[[float], float], most_points: int) -> list[Curve]:
    """A curve that equals one before it, such as a loss without extra weight, is not drawn again.
    """
    curves: list[Curve] = []
    for (key, name), color in zip(names.items(), PALETTE):
        points = [(r["step"], unit(r[key])) for r in records if isinstance(r.get(key), int | float)]
        if points and not any(_same(points, curve.points) for curve in curves):
            curves.append(Curve(name, color, points))
    return [Curve(c.name, c.color, thin(c.points, most_points)) for c in curves]


def _same(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> bool:
    return len(a) == len(b) and all(abs(x[1] - y[1]) <= 1e-6 * abs(y[1]) for x, y in zip(a, b))


def draw_courses(courses: Sequence[Course], path: Path) -> None:
    """Write all of them as one PNG, two beside one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(courses) // 2)
    figure = Figure(figsize=(10, 2.7 * rows))
    axes = figure.subplots(rows, 2, squeeze=False, gridspec_kw={
        "left": 0.07, "right": 0.98, "bottom": 0.5 / (2.7 * rows), "top": 1 - 0.3 / (2.7 * rows),
        "hspace": 0.4, "wspace": 0.16}).flatten()
    for ax, course in zip(axes, courses):
        _draw(ax, course)
    for ax in axes[len(courses):]:
        ax.set_axis_off()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw(ax: Any, course: Course) -> None:
    for curve in course.curves:
        ax.plot(*zip(*curve.points), color=curve.color, linewidth=1.4, label=curve.name,
                marker="o" if len(curve.points) < 2 else None)
    ax.set_xlim(*course.x_range)
    ax.set_ylim(*course.y_range)
    (low, high), ends = course.x_range, [step for step, _ in course.phases[1:]]
    for (step, number), end in zip(course.phases, [*ends, high], strict=False):
        ax.axvline(step, color="#666666", linestyle="--", linewidth=1)
        if end - step < _LABEL_SHARE * (high - low):
            continue  # it would lie on the next
        ax.annotate(f" phase {number}", (step, 1), xycoords=("data", "axes fraction"), fontsize=8,
                    color="#555555", va="top")
    ax.set_title(course.title, fontsize=10)
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if len(course.curves) > 1:
        ax.legend(fontsize=8, frameon=False)
