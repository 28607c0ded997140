"""Plots: skill kept under each RoPE, and against the diagnostics that foretell it best."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]
COLORS = {"theta": "#7f0000", "ntk": "#d62728", "critical": "#ff7f0e", "linear": "#8c564b",
          "by-parts 1-4": "#1f77b4", "by-parts 0.5-2": "#17becf", "by-parts 1-32": "#2ca02c",
          "yarn": "#9467bd", "yarn, no attention factor": "#e377c2"}
FAMILY_COLORS = {"every-pair": "#d62728", "by-parts": "#1f77b4", "yarn": "#9467bd",
                 "part": "#7f7f7f"}


def plot_kept(rows: Sequence[Json], path: Path) -> Path:
    """Skill kept against the factor, one line for each method, one panel for each sibling."""
    plt = _pyplot()
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    strengths = list(dict.fromkeys(
        row["strength"] for row in sorted(rows, key=lambda r: (" " in r["strength"], r["drift"]))))
    figure, axes = plt.subplots(len(skills), len(strengths), sharex=True, sharey=True,
                                squeeze=False,
                                figsize=(2.9 * len(strengths) + 2.2, 2.3 * len(skills)))
    for i, skill in enumerate(skills):
        for j, strength in enumerate(strengths):
            own = [r for r in rows if r["skill"] == skill and r["strength"] == strength]
            _lines(axes[i][j], own)
            drift = f", drift {own[0]['drift']:.4f}" if own else ": not learned"
            axes[i][j].set_title(f"{skill}, {strength}{drift}", fontsize=8)
            axes[i][j].label_outer()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.supxlabel("target length / native length", fontsize=9)
    figure.supylabel("skill kept (share of the skill under the native RoPE)", fontsize=9)
    figure.legend(handles, labels, loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.9 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _lines(axis: Any, rows: Sequence[Json]) -> None:
    for k, (kind, color) in enumerate(COLORS.items()):
        points = sorted((row["factor"], row["kept"]) for row in rows if row["kind"] == kind)
        # Side by side, because many lines lie on 1.
        axis.plot([factor * 1.03 ** (k - 4) for factor, _ in points], [kept for _, kept in points],
                  "o-", color=color, label=kind, markersize=3, linewidth=1.1)
    factors = sorted({row["factor"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(factors, [str(factor) for factor in factors])
    axis.minorticks_off()
    axis.set_ylim(-0.05, 1.1)
    axis.grid(alpha=0.25)


def plot_predictors(rows: Sequence[Json], prediction: Mapping[str, Json], path: Path,
                    count: int = 6) -> Path:
    """Skill kept against the diagnostics; `movement` and those that foretell the loss best."""
    plt = _pyplot()
    order = sorted(prediction, key=lambda name: -(prediction[name]["mean"] or -1))
    shown = list(dict.fromkeys(["d: movement", *order]))[:count]
    figure, axes = plt.subplots(2, (count + 1) // 2, sharey=True, squeeze=False, figsize=(11, 6))
    for axis, name in zip(axes.flat, shown, strict=False):
        for family, color in FAMILY_COLORS.items():
            own = [row for row in rows if row["family"] == family]
            axis.scatter([row[name] for row in own], [row["kept"] for row in own], s=9, alpha=0.5,
                         color=color, label=family, linewidths=0)
        axis.set_title(f"{name.removeprefix('d: ')}\nrank correlation with the loss of skill "
                       f"{prediction[name]['mean'] or 0:.2f}", fontsize=8)
        axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    figure.supylabel("skill kept", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
