"""lineage.png: drift, cosine and conflict over the layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.delta.conflict import Conflict
from extend.delta.lineage import HEAVY, OTHER_RUN, UNRELATED
from extend.delta.moments import Estimate

if TYPE_CHECKING:
    from extend.lineage.report import Report

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"
_LEAST = 1e-6  # of a logarithmic axis: what is less, zero included, is drawn there


def draw_lineage(report: "Report", path: Path) -> None:
    """Write a PNG: one panel each for drift, cosine and, where it was measured, conflict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 2 + (report.conflict is not None)
    figure = Figure(figsize=(9, 2.6 * panels + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True)
    layers = report.lineage.layers()
    moments = [report.moments(names) for names in layers.values()]
    _draw_drift(axes[0], list(layers), moments)
    _draw_cosine(axes[1], list(layers), [m[0].cosine() for m in moments])
    if report.conflict is not None:
        _draw_conflict(axes[2], report, layers)
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.grid(True, color="#eeeeee")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    base = report.inputs.get("base") or report.inputs["adapter"]
    names = f"{report.inputs['target'].name} against {base.name}".replace("$", r"\$")
    figure.suptitle(f"{names}: {report.lineage.kind}", fontsize=12)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_drift(ax: Any, layers: list[int], moments: list[Any]) -> None:
    for index, label, color in ((0, "matrices", _BLUE), (1, "norms, biases", _ORANGE)):
        _line(ax, layers, [m[index].drift() for m in moments], label, color, least=_LEAST)
    ax.axhline(HEAVY, color="#888888", linewidth=0.8, linestyle=":", label="heavily tuned above")
    ax.set_yscale("log")
    ax.set_ylabel("drift")


def _draw_cosine(ax: Any, layers: list[int], cosines: list[Estimate | None]) -> None:
    _line(ax, layers, cosines, "matrices", _BLUE, least=-1.0)
    for value, label, style in ((OTHER_RUN, "other run below", ":"), (UNRELATED, "unrelated below",
                                                                      "--")):
        ax.axhline(value, color="#888888", linewidth=0.8, linestyle=style, label=label)
    ax.set_ylabel("cosine with the base")


def _draw_conflict(ax: Any, report: "Report", layers: dict[int, list[str]]) -> None:
    totals = [Conflict.total(report.conflict[n] for n in names if n in report.conflict).to_json()
              for names in layers.values()]
    for key, label, color in (("cosine", "cosine of the deltas", _GREEN),
                              ("left", "energy in left subspace", _BLUE),
                              ("right", "energy in right subspace", _ORANGE)):
        points = [(i, t[key]) for i, t in zip(layers, totals) if t[key] is not None]
        if points:
            ax.plot(*zip(*points), marker="o", markersize=3, color=color, label=label)
        chance = [(i, t[f"{key}_chance"]) for i, t in zip(layers, totals)
                  if t.get(f"{key}_chance") is not None]
        if chance:
            ax.plot(*zip(*chance), linestyle=":", color=color, label=f"{key}, by chance")
    ax.set_ylabel("long delta")


def _line(ax: Any, layers: list[int], values: list[Estimate | None], label: str, color: str,
          least: float) -> None:
    """A line, and where the values are estimates their intervals."""
    points = [(i, v) for i, v in zip(layers, values) if v is not None]
    if not points:
        return
    at = [i for i, _ in points]
    ax.plot(at, [max(v.value, least) for _, v in points], marker="o", markersize=3, color=color,
            label=label)
    ax.fill_between(at, [max(v.low, least) for _, v in points],
                    [max(v.value if v.high is None else v.high, least) for _, v in points],
                    color=color, alpha=0.2, linewidth=0)
