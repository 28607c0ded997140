"""Frequencies before and after, for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.plan.rope import RopePlan

if TYPE_CHECKING:
    from extend.rope.analysis import RopeAnalysis

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c564b",
           "#999900", "#607080")
# Kinds that divide frequencies agree on the slow pairs: their dashes let each other show through.
_DASHES = {"default": "-", "linear": (0, (1, 2.4)), "llama3": (0, (5, 3)),
           "yarn": (0, (5, 2, 1.2, 2)), "longrope": (0, (2.5, 1.5)),
           "proportional": (0, (5, 2, 1.2, 2, 1.2, 2))}
_SAME = 1e-3  # relative difference of frequencies that no eye sees


@dataclass(frozen=True, slots=True)
class _Curve:
    label: str
    found: "RopeAnalysis"
    style: dict[str, Any]


def draw_frequencies(plan: RopePlan, path: Path) -> None:
    """Write a PNG: wavelengths over pairs above, and below how much slower each pair turns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    curves = _curves(plan.methods)
    _draw_wavelengths(upper, plan, curves)
    _draw_slowdown(lower, plan, curves)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper", fontsize=9,
                  frameon=False)
    native = plan.native
    figure.suptitle(f"RoPE from {native.original_len:,} to {plan.target_len:,} tokens, theta "
                    f"{native.rope_theta:,.0f}, {native.rotary_dim} rotated channels", fontsize=12)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _curves(methods: Mapping[str, "RopeAnalysis"]) -> list[_Curve]:
    """One curve for methods that look alike, those that slow the last pair most first."""
    groups: list[tuple[list[str], RopeAnalysis]] = []
    for name, found in methods.items():
        alike = next((names for names, other in groups
                      if bool(((found.inv_freq - other.inv_freq).abs()
                               <= _SAME * other.inv_freq).all())), None)
        if alike is None:
            groups.append(([name], found))
        else:
            alike.append(name)
    groups.sort(key=lambda group: -float(group[1].slowdown[-1]))
    return [_Curve("\n= ".join(names), found, {
        "color": _COLORS[i % len(_COLORS)], "linewidth": 1.7,
        "linestyle": _DASHES.get(found.rope.rope_type, "-")})
        for i, (names, found) in enumerate(groups)]


def _draw_wavelengths(ax: Any, plan: RopePlan, curves: list[_Curve]) -> None:
    pairs = range(len(plan.unchanged.inv_freq))
    ax.plot(pairs, plan.unchanged.wavelength, color="black", linewidth=2.4, label="native")
    for curve in curves:
        ax.plot(pairs, curve.found.wavelength, label=curve.label, **curve.style)
    for length, name in ((plan.native.original_len, "native length"),
                         (plan.target_len, "target length")):
        ax.axhline(length, color="#888888", linewidth=0.8)
        ax.text(0, length, f" {name}", fontsize=8, color="#555555", va="bottom")
    ax.set_yscale("log")
    ax.set_ylabel("wavelength, tokens")
    _tidy(ax, plan)
    ax.text(plan.critical_index, 0.02, " one turn in the native length", fontsize=8,
            color="#555555", transform=ax.get_xaxis_transform())


def _draw_slowdown(ax: Any, plan: RopePlan, curves: list[_Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    pairs = range(len(plan.unchanged.inv_freq))
    ax.axhline(1, color="black", linewidth=2.4)
    for curve in curves:
        ax.plot(pairs, curve.found.slowdown, **curve.style)
    ax.axhline(plan.factor, color="#888888", linewidth=0.8)
    ax.text(0, plan.factor, f" factor {plan.factor:.4g}", fontsize=8, color="#555555", va="bottom")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel("native frequency / new frequency")
    ax.set_xlabel("pair, fastest first")
    _tidy(ax, plan)


def _tidy(ax: Any, plan: RopePlan) -> None:
    ax.axvline(plan.critical_index, color="#888888", linewidth=0.8)
    ax.margins(x=0.01)
    ax.grid(True, color="#eeeeee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
