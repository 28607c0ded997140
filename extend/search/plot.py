"""front.png: needle loss against short loss and against the disturbance of siblings."""

from pathlib import Path
from typing import Any

import numpy as np

from extend.search.data import SEARCH
from extend.search.front import on_front
from extend.search.lab import Result
from extend.search.report import Outcome

_FLOOR = 1e-4  # nats; what is less is drawn there, since the axes are logarithmic
_STYLE = {"analytic": ("#d55e00", "s", 26), "theta": ("#009e73", "^", 22),
          "curve": ("#7aa6c2", "o", 16)}
_MARKS = {"needle": "*", "compromise": "P", "merge-safe": "D", "theta": "v"}


def draw_front(outcome: Outcome, path: Path, title: str) -> None:
    """Write a PNG with two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    native = outcome.of(SEARCH, "native")[0].point(outcome.target_len)
    _draw(left, outcome, 1, float(native[1]))
    _draw(right, outcome, 2, 0.0)
    left.set_ylabel("needle-answer loss at the target, nats a token")
    left.set_xlabel(f"loss on native-length text above the unchanged model's {native[1]:.3f}, nats")
    right.set_xlabel("disturbance of siblings: KL(own RoPE || setting), nats a token")
    left.axhline(native[0], color="#888888", linewidth=1, linestyle=":")
    left.text(0.99, native[0], "unchanged", transform=left.get_yaxis_transform(), fontsize=8,
              color="#666666", ha="right", va="bottom")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=9, frameon=False)
    figure.suptitle(title.replace("$", r"\$"), fontsize=12)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw(ax: Any, outcome: Outcome, axis: int, offset: float) -> None:
    def place(result: Result) -> tuple[float, float]:
        point = result.point(outcome.target_len)
        return max(float(point[axis]) - offset, _FLOOR), float(point[0])

    results = outcome.of(SEARCH, "analytic", "theta", "curve")
    for origin, (color, marker, size) in _STYLE.items():
        points = [place(r) for r in results if r.candidate.origin == origin]
        if points:
            ax.scatter(*zip(*points), s=size, c=color, marker=marker, label=origin, zorder=3)
    points = np.array([place(r) for r in results])
    front = points[on_front(points)]
    ax.plot(*front[np.argsort(front[:, 0])].T, color="#555555", linewidth=1, zorder=2,
            label="front", drawstyle="steps-post")
    for name, result in outcome.chosen.items():
        ax.scatter(*place(result), s=150, facecolors="none", edgecolors="black",
                   marker=_MARKS[name], linewidths=1.2, label=f"chosen: {name}", zorder=5)
        _error_bars(ax, outcome, result, axis, offset)
    _name_methods(ax, [(r.candidate.name, place(r)) for r in outcome.of(SEARCH, "analytic")])
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _error_bars(ax: Any, outcome: Outcome, result: Result, axis: int, offset: float) -> None:
    low, high = np.percentile(outcome.splits[SEARCH].draws(result), [2.5, 97.5], axis=0)
    point = result.point(outcome.target_len)
    x = max(float(point[axis]) - offset, _FLOOR)
    ax.plot([x, x], [low[0], high[0]], color="black", linewidth=0.8, zorder=4)


def _name_methods(ax: Any, named: list[tuple[str, tuple[float, float]]]) -> None:
    """Labels beside the points, moved down where they would lie on one another."""
    taken: list[float] = []
    for name, (x, y) in sorted(named, key=lambda item: -item[1][1]):
        level = float(np.log10(max(y, _FLOOR)))
        while any(abs(level - other) < 0.05 for other in taken):
            level -= 0.01
        taken.append(level)
        short = name.replace("low_freq_factor", "low").replace("high_freq_factor", "high")
        short = short.replace("attention_factor", "attention")
        ax.annotate(short, (x, y), xytext=(x * 1.12, 10 ** level), fontsize=7, color="#8a3b00",
                    va="center", arrowprops={"arrowstyle": "-", "color": "#d9b79c",
                                             "linewidth": 0.5})
