"""Curves with their intervals: data once, drawn on the page and as PNG and SVG files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.evaluate.effective import OWN_SHARE, RULER_THRESHOLD
from extend.evaluate.heatmap import plain, save_figure, some_of
from extend.page.chart import PALETTE, Chart
from extend.results import Results, format_length, format_rate

_Z95 = 1.959963984540054
_PAGE_TICKS, _MOST_TICKS = 6, 24
_MARKERS = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class Point:
    """A place of a curve, its 95 % interval (both ends None without), and what it says."""

    x: float
    y: float
    low: float | None
    high: float | None
    tip: str


@dataclass(frozen=True, slots=True)
class Series:
    """The curve of one model; `native_len` is where its own context ends."""

    name: str
    color: str
    native_len: int
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves of several models over a logarithmic axis of tokens.

    Attributes:
        kind: `scores` or `loss`.
        levels: (value, text) of lines across.
        ticks: tokens.
    """

    kind: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[int]
    levels: Sequence[tuple[float, str]] = ()

    @property
    def x_range(self) -> tuple[float, float]:
        found = [point.x for line in self.series for point in line.points]
        low, high = min(found), max(found)
        return (low, high) if low < high else (low / 2, high * 2)

    @property
    def y_range(self) -> tuple[float, float]:
        if self.kind == "scores":
            return 0.0, 1.0
        values = [v for line in self.series for p in line.points for v in (p.low, p.y, p.high)
                  if v is not None] + [value for value, _ in self.levels]
        room = 0.06 * (max(values) - min(values)) or 0.1
        return min(values) - room, max(values) + room

    @property
    def natives(self) -> list[tuple[int, str, str]]:
        """(tokens, label, colour) where a model's own context ends inside the plot."""
        low, high = self.x_range
        return [(s.native_len, s.name, s.color) for s in self.series if low <= s.native_len < high]

    def chart(self) -> Chart:
        """The same for the page."""
        step = -(-len(self.ticks) // _PAGE_TICKS) or 1
        chart = Chart(self.title, self.x_label, self.x_range, self.y_range, log_x=True,
                      fixed_x=[(n, format_length(n)) for n in self.ticks[::-1][::step][::-1]])
        for value, text in self.levels:
            chart.mark_y(value, text, "var(--soft)")
        for tokens, _, color in self.natives:
            chart.mark_x(tokens, "", color)
        for above, line in zip(range(len(self.series))[::-1], self.series):
            ends = [(p.x, p.low, p.high) for p in line.points if p.low is not None]
            chart.add_band(ends, line.color)
            chart.add(line.name, line.color, [(p.x, p.y) for p in line.points], above=above,
                      dots=[(p.x, p.y, f"{line.name}, {p.tip}") for p in line.points])
        return chart


def score_plots(results: Sequence[Results], names: Sequence[str]) -> list[Plot]:
    """Score by length of each task, and of the mean over RULER's where there are several."""
    plots = [_score_plot(name, [(r, _lengths(r, name)) for r in results], _levels(results, name))
             for name in names]
    rulers = [(r, r.data["summary"]["effective_lengths"]["ruler"]) for r in results]
    if any(rule and len(rule["tasks"]) > 1 for _, rule in rulers):
        means = [(r, rule["lengths"] if rule else {}) for r, rule in rulers]
        plots.append(_score_plot("RULER, mean over its tasks", means,
                                 [(RULER_THRESHOLD, f"{100 * RULER_THRESHOLD:g} %")]))
    return [plot for plot in plots if plot.series]


def _lengths(result: Results, name: str) -> Mapping[str, Any]:
    return result.data["summary"]["tasks"].get(name, {}).get("lengths", {})


def _levels(results: Sequence[Results], name: str) -> list[tuple[float, str]]:
    """Where guessing is, and where the first model's own rule draws its line."""
    tasks = [t for r in results if (t := r.data["summary"]["tasks"].get(name))]
    chances = {t["chance"] for t in tasks if t["chance"] is not None and t["chance"] >= 0.005}
    levels = [(chance, "chance") for chance in sorted(chances)]
    rules = [t["own_rule"]["threshold"] for t in tasks if t["own_rule"]]
    if len(results) == 1 and rules:
        levels.append((rules[0], f"{100 * OWN_SHARE:g} % of its own short score"))
    return levels


def _score_plot(name: str, entries: Sequence[tuple[Results, Mapping[str, Any]]],
                levels: Sequence[tuple[float, str]]) -> Plot:
    series = [Series(result.label, PALETTE[number % len(PALETTE)], result.native_len, [
        Point(int(length), e["score"], e["wilson_low"], e["wilson_high"],
              f"{int(length):,} tokens: {format_rate(e)}") for length, e in by_length.items()])
        for number, (result, by_length) in enumerate(entries) if by_length]
    ticks = sorted({int(length) for _, by_length in entries for length in by_length})
    return Plot("scores", name, "length, tokens", "mean score", series, ticks, levels)


def loss_plots(results: Sequence[Results]) -> list[Plot]:
    """Loss by position of each task that measured it.

    Of several models that were read in short windows too, first the losses alone, then what each
    loses over its own windows.
    """
    names = dict.fromkeys(row["name"] for r in results for row in r.data["rows"] if "curve" in row)
    return [plot for name in names for plot in _loss_plots(name, results)]


def _loss_plots(name: str, results: Sequence[Results]) -> list[Plot]:
    longest = [(result, row) for result in results
               if (row := max((row for row in result.data["rows"] if row["name"] == name
                               and "curve" in row), key=lambda row: row["length"], default=None))]
    shorts = {row.get("short") for _, row in longest}
    if len(longest) == 1 or len(shorts) > 1 or None in shorts:
        return [_loss_plot(name, "loss, nats a token",
                           [(result, curve) for result, row in longest
                            for curve in _loss_curves(result.label, row).items()])]
    over = f"nats a token more than in its own windows of {format_length(shorts.pop())}"
    return [_loss_plot(name, "loss, nats a token",
                       [(result, (result.label, _losses(row))) for result, row in longest]),
            _loss_plot(f"{name}-over-windows", over,
                       [(result, (result.label, _excess(row))) for result, row in longest],
                       [(0.0, "")])]


def _loss_plot(title: str, y_label: str, curves: Sequence[tuple[Results, tuple[str, list[Point]]]],
               levels: Sequence[tuple[float, str]] = ()) -> Plot:
    series = [Series(label, PALETTE[number % len(PALETTE)], result.native_len, points)
              for number, (result, (label, points)) in enumerate(curves)]
    last = max(point.x for line in series for point in line.points)
    first = min(point.x for line in series for point in line.points)
    ticks = [2 ** k for k in range(40) if first <= 2 ** k <= last]
    return Plot("loss", title, "position, tokens", y_label, series, ticks, levels)


def _losses(row: Mapping[str, Any]) -> list[Point]:
    return [_loss_point(part, part["loss"], part.get("stderr")) for part in row["curve"]]


def _loss_curves(label: str, row: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The loss in the whole row, and that of the same tokens in short windows if it is known."""
    curves = {label: _losses(row)}
    if row.get("short"):
        curves[f"{label}, windows of {format_length(row['short'])}"] = [
            _loss_point(part, part["short_loss"], None) for part in row["curve"]]
    return curves


def _excess(row: Mapping[str, Any]) -> list[Point]:
    """Beyond the first window, in which both are the same."""
    return [_loss_point(part, part["excess"], part["excess_stderr"]) for part in row["curve"]
            if part["end"] > row["short"]]


def _loss_point(part: Mapping[str, Any], loss: float, error: float | None) -> Point:
    """A stretch of positions stands at its geometric middle."""
    middle = (max(1, part["begin"]) * max(1, part["end"])) ** 0.5
    low, high = (None, None) if error is None else (loss - _Z95 * error, loss + _Z95 * error)
    spread = "" if error is None else f" +/- {error:.4f}"
    return Point(middle, loss, low, high,
                 f"tokens {part['begin']:,} to {part['end']:,}: {loss:.4f}{spread} nats "
                 f"over {part['tokens']:,} tokens")


def draw_plot(plot: Plot, path: Path) -> None:
    """Write a PNG, and an SVG beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for number, line in enumerate(plot.series):
        ax.plot([p.x for p in line.points], [p.y for p in line.points], color=line.color,
                marker=_MARKERS[number % len(_MARKERS)], markersize=5, label=plain(line.name))
        known = [p for p in line.points if p.low is not None]
        ax.fill_between([p.x for p in known], [p.low for p in known], [p.high for p in known],
                        color=line.color, alpha=0.16, linewidth=0)
    for tokens, _, color in plot.natives:
        ax.axvline(tokens, color=color, linestyle="--", linewidth=1.5)
    for value, text in plot.levels:
        ax.axhline(value, color="#666666", linestyle=":", linewidth=1)
        ax.annotate(text, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8,
                    color="#555555", va="bottom")
    _dress(ax, plot)
    save_figure(figure, path)


def _dress(ax: Any, plot: Plot) -> None:
    low, high = plot.y_range
    ax.set_xscale("log", base=2)
    ticks = some_of(plot.ticks, _MOST_TICKS)
    ax.set_xticks(list(ticks), [format_length(n) for n in ticks], fontsize=8)
    ax.minorticks_off()
    ax.set_ylim((low - 0.03, high + 0.03) if plot.kind == "scores" else (low, high))
    ax.set_xlabel(plot.x_label + (" (dashed: the model's own context ends)" if plot.natives
                                  else ""), fontsize=9)
    ax.set_ylabel(plot.y_label, fontsize=9)
    ax.set_title(plain(plot.title), fontsize=11)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
