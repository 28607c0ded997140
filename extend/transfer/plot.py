"""How learning went, and the weights that it found, as a picture."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = {"objective": "-", "kl": "--", "retrieval_loss": ":"}
_GROUP = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.(.+))?$")


def draw_course(path: Path, history: Mapping[str, Sequence[Mapping[str, Any]]],
                groups: Mapping[str, float] | None = None) -> None:
    """Write a PNG.

    Args:
        history: label of a course -> its looks at the held-out half.
        groups: fitted weights; drawn over the layers on the left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if groups is None else 2
    figure = Figure(figsize=(6.2 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if groups is not None:
        _draw_weights(axes[0], groups)
    _draw_losses(axes[-1], history)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_losses(axes: Any, history: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for color, (label, looks) in zip(_COLORS, history.items(), strict=False):
        for key, line in _LINES.items():
            values = [look[key] for look in looks]
            if None not in values:
                axes.plot([look["step"] for look in looks], values, line, color=color, marker="o",
                          markersize=3, label=f"{label}: {key.replace('_', ' ')}")
    axes.set(xlabel="step", ylabel="nats a token, held-out half", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)


def _draw_weights(axes: Any, groups: Mapping[str, float]) -> None:
    """One line for each kind of module; groups outside the layers as lines across."""
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[int, float]]] = {}
    for group, weight in groups.items():
        match = _GROUP.search(group)
        if match is None:
            axes.axhline(weight, color="#999999", linewidth=0.8)
            axes.annotate(group, (1, weight), xycoords=("axes fraction", "data"), fontsize=7,
                          ha="right", va="bottom", color="#666666")
        else:
            kinds.setdefault(match[2] or "layer", []).append((int(match[1]), weight))
    for i, (kind, points) in enumerate(sorted(kinds.items())):
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3,
                  color=_COLORS[i % len(_COLORS)], label=kind)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="weight of the delta", ylim=(-0.05, 1.55))
    axes.legend(fontsize=8, frameon=False)
