"""front.png: needle loss against short loss and against the disturbance of siblings."""

from pathlib import Path
from typing import Any

import numpy as np

from extend.search.data import SEARCH
from extend.search.front import on_front
from extend.search.lab import Result
from extend.search.report import Outcome

_STYLE = {"analytic": ("#d55e00", "s", 34), "theta": ("#009e73", "^", 24),
          "curve": ("#7aa6c2", "o", 16)}
_MARKS = {"needle": "*", "compromise": "P", "merge-safe": "D", "theta": "v"}
_LEAST = {0: 1e-2, 1: 1e-3, 2: 1e-4}  # nats, of each axis: what is less is drawn there


def draw_front(outcome: Outcome, path: Path, title: str) -> None:
    """Write a PNG with two panels and a key of the analytic methods, which are numbered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, key = figure.subplots(1, 3, width_ratios=[1, 1, 0.5])
    native = outcome.of(SEARCH, "native")[0].point(outcome.target_len)
    for ax, axis, offset in ((left, 1, float(native[1])), (right, 2, 0.0)):
        _draw(ax, outcome, axis, offset)
        ax.axhline(native[0], color="#888888", linewidth=1, linestyle=":")
        ax.set_ylabel("needle-answer loss at the target, nats a token", fontsize=9)
    left.text(0.01, native[0], "unchanged model", transform=left.get_yaxis_transform(),
              fontsize=8, color="#666666", va="bottom")
    left.set_xlabel(f"loss on native-length text above the unchanged model's {native[1]:.3f}, "
                    "nats a token", fontsize=9)
    right.set_xlabel("disturbance of siblings: KL(own RoPE || setting), nats a token", fontsize=9)
    _write_key(key, outcome, left)
    figure.suptitle(title.replace("$", r"\$"), fontsize=12)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw(ax: Any, outcome: Outcome, axis: int, offset: float) -> None:
    def place(result: Result) -> tuple[float, float]:
        point = result.point(outcome.target_len)
        return (max(float(point[axis]) - offset, _LEAST[axis]), max(float(point[0]), _LEAST[0]))

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
        ax.scatter(*place(result), s=190, facecolors="none", edgecolors="black",
                   marker=_MARKS[name], linewidths=1.2, label=f"chosen: {name}", zorder=5)
        _draw_interval(ax, outcome, result, place(result)[0])
    for number, result in enumerate(outcome.of(SEARCH, "analytic"), start=1):
        ax.annotate(str(number), place(result), xytext=(5, 4), textcoords="offset points",
                    fontsize=8, color="#8a3b00", zorder=6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.tick_params(labelsize=8)
    ax.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_interval(ax: Any, outcome: Outcome, result: Result, x: float) -> None:
    """The 95 % interval of a chosen setting's needle loss."""
    needle = outcome.splits[SEARCH].describe(result)["needle"]
    ax.plot([x, x], [max(needle["low"], _LEAST[0]), max(needle["high"], _LEAST[0])],
            color="black", linewidth=0.8, zorder=4)


def _write_key(ax: Any, outcome: Outcome, panel: Any) -> None:
    """Markers, and the names behind the numbers."""
    ax.set_axis_off()
    handles, labels = panel.get_legend_handles_labels()
    legend = ax.legend(handles, labels, loc="upper left", fontsize=8.5, frameon=False,
                       labelspacing=0.9)
    legend.set_in_layout(False)
    lines = [f"{number}  {_shorten(r.candidate.name)}"
             for number, r in enumerate(outcome.of(SEARCH, "analytic"), start=1)]
    ax.text(0.02, 0.44, "\n".join(["analytic methods", *lines]), transform=ax.transAxes,
            fontsize=8.5, color="#8a3b00", va="top", linespacing=1.45).set_in_layout(False)


def _shorten(name: str) -> str:
    for long, short in (("low_freq_factor=", ""), (" high_freq_factor=", " to "),
                        ("partial_rotary_factor=", ""), ("attention_factor", "attention")):
        name = name.replace(long, short)
    return name
