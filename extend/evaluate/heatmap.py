"""Heat maps of a task on a grid of lengths and depths: a PNG, and the data for the page's SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.page.chart import ink_on, shade
from extend.results import Results, format_length

COLORS = "cividis"  # even in lightness, and the same to colour-blind eyes
_TEXT_FITS = 12  # columns up to which the counts are written into the cells
_PANELS_A_ROW = 4
_MOST_SQUARES = 48  # to a side; of more, all have their colour but the picture does not grow
MOST_CELLS = 6000
"""Squares of all heat maps that a page draws one by one."""


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One cell; `score` is None where the model was not asked; `n` prompts, `interval` 95 %."""

    length: int
    depth: float
    score: float | None
    n: int
    interval: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        """Right answers of prompts, or the mean grade where answers are right in part."""
        points = (self.score or 0.0) * self.n
        whole = abs(points - round(points)) < 1e-3
        return f"{round(points)}/{self.n}" if whole else f"{self.score:.2f}"

    @property
    def color(self) -> str:
        return "none" if self.score is None else shade(self.score)

    @property
    def text_color(self) -> str:
        """Black on the light half of the scale, white on the dark one."""
        return ink_on(self.score or 0.0)

    @property
    def tip(self) -> str:
        where = f"{self.length:,} tokens, depth {self.depth:.2f}"
        if self.score is None:
            return f"{where}: not measured"
        text = self.text.replace("/", " of ") if "/" in self.text else (
            f"{self.text}, mean of {self.n}")
        spread = "" if self.interval is None else " ({:.0f}-{:.0f} %)".format(
            *(100 * end for end in self.interval))
        return f"{where}: {text}{spread}"


@dataclass(frozen=True, slots=True)
class Panel:
    """The heat map of one model.

    Attributes:
        cells: by depth, then length.
        native_columns: columns that lie within the model's own context.
        n_text: prompts in a cell, in words.
    """

    label: str
    lengths: Sequence[int]
    depths: Sequence[float]
    cells: Sequence[Sequence[HeatCell]]
    native_columns: int
    n_text: str

    @property
    def show_counts(self) -> bool:
        return len(self.lengths) <= _TEXT_FITS

    @property
    def length_texts(self) -> list[str]:
        return [format_length(n) for n in self.lengths]

    @property
    def geometry(self) -> dict[str, float]:
        """Sizes of the page's drawing; cells are wide enough for their counts."""
        cell_w, cell_h, left, top, bottom = 52, 26, 46, 6, 40
        width = left + cell_w * len(self.lengths) + 6
        height = top + cell_h * len(self.depths) + bottom
        return {"cell_w": cell_w, "cell_h": cell_h, "left": left, "top": top, "width": width,
                "height": height, "floor": top + cell_h * len(self.depths)}


def build_panels(results: Sequence[Results], name: str) -> list[Panel]:
    """One panel a model, all on the same lengths and depths."""
    grids = {result.label: result.grid(name) for result in results}
    rows = [row for grid in grids.values() for row in grid]
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    return [_panel(result, grids[result.label], lengths, depths)
            for result in results if grids[result.label]]


def _panel(result: Results, rows: Sequence[Mapping[str, Any]], lengths: Sequence[int],
           depths: Sequence[float]) -> Panel:
    known = {(row["length"], row["depth"]): row for row in rows}

    def cell(length: int, depth: float) -> HeatCell:
        row = known.get((length, depth))
        if row is None:
            return HeatCell(length, depth, None, 0)
        ends = row.get("wilson_low"), row.get("wilson_high")
        return HeatCell(length, depth, row["score"], row["n"], None if None in ends else ends)

    counts = sorted({row["n"] for row in rows})
    n_text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return Panel(result.label, lengths, depths, [[cell(n, d) for n in lengths] for d in depths],
                 sum(length <= result.native_len for length in lengths), f"{n_text} a cell")


def draw_heatmap(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Write a PNG with the panels side by side, and an SVG beside it."""
    from matplotlib.figure import Figure

    columns = min(len(panels), _PANELS_A_ROW)
    lines = math.ceil(len(panels) / columns)
    wide = max(2.3, 0.5 * min(len(panels[0].lengths), _MOST_SQUARES) + 0.3)
    high = max(2.2, 0.28 * min(len(panels[0].depths), _MOST_SQUARES) + 0.7)
    figure = Figure(figsize=(wide * columns + 1.5, high * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for ax, panel in zip(axes.flat, panels):
        image = _draw_panel(ax, panel)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
    bar.set_label("mean score", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    figure.suptitle(plain(title), fontsize=12)
    dashed = any(0 < panel.native_columns < len(panel.lengths) for panel in panels)
    figure.supxlabel("prompt length, tokens" + (
        " (dashed line: the model's own context ends)" if dashed else ""), fontsize=9)
    figure.supylabel("depth of the fact (0 = start)", fontsize=9)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as `path`, a PNG, and as SVG; the same figure gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out
    with matplotlib.rc_context({"svg.hashsalt": "extend"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def _draw_panel(ax: Any, panel: Panel) -> Any:
    scores = [[math.nan if c.score is None else c.score for c in line] for line in panel.cells]
    many = max(len(panel.lengths), len(panel.depths)) > _MOST_SQUARES
    edges = {} if many else {"edgecolors": "white", "linewidth": 1}
    image = ax.pcolormesh(scores, cmap=COLORS, vmin=0, vmax=1, rasterized=many, **edges)
    ax.set_facecolor("#dddddd")
    ax.set_ylim(len(panel.depths), 0)  # depth 0 on top
    columns = some_of(range(len(panel.lengths)), _MOST_SQUARES)
    ax.set_xticks([i + 0.5 for i in columns], [format_length(panel.lengths[i]) for i in columns],
                  rotation=90 if many else 0)
    lines = some_of(range(len(panel.depths)), _MOST_SQUARES)
    ax.set_yticks([i + 0.5 for i in lines], [f"{panel.depths[i]:.2f}" for i in lines])
    ax.tick_params(labelsize=8, length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(plain(f"{panel.label}\n{panel.n_text}"), fontsize=9)
    for y, line in enumerate(panel.cells):
        for x, cell in enumerate(line):
            if cell.score is not None and panel.show_counts:
                ax.text(x + 0.5, y + 0.5, cell.text, ha="center", va="center",
                        fontsize=7, color=cell.text_color)
    if 0 < panel.native_columns < len(panel.lengths):
        ax.axvline(panel.native_columns, color="#d55e00", linewidth=2, linestyle="--")
    return image


def some_of(values: Sequence[int], most: int) -> Sequence[int]:
    """All of them, or of too many every so-many-th."""
    return values[::-(-len(values) // most)] if values else values


def plain(text: str) -> str:
    """Labels are the user's: `$` must not start a formula."""
    return text.replace("$", r"\$")
