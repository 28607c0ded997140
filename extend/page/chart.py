"""Line charts as data for the macro `chart` of `chart.html.jinja`.

Charts are drawn at the width of a phone and grow with the page, so that their text stays legible.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 40
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f5fc0", "#888888")
"""Colours of lines, told apart by colour-blind eyes too."""
_SHADES = ("#00204c", "#213d6b", "#4a5a6d", "#666970", "#7d7c78", "#a59c74", "#c9b869", "#ecd84a",
           "#ffea46")  # the colour map cividis at eighths
_BLENDS = ("#0072b2", "#7f8790", "#d55e00")


@dataclass(frozen=True, slots=True)
class Line:
    """A curve in SVG units; `dots` are (x, y, text); `said` is its course in words."""

    name: str
    color: str
    points: str
    dots: Sequence[tuple[float, float, str]] = ()
    dashed: bool = False
    width: float = 2.0
    said: str = ""


@dataclass(slots=True)
class Chart:
    """Axes, and what is drawn on them.

    Attributes:
        title: shown above.
        x_range, y_range: of the data; a logarithmic axis needs both above 0.
        fixed_x: (value, text) of the ticks, in place of round numbers.
        bars: (x, low, high, colour), such as intervals.
        bands: (points, colour) of areas, such as intervals along a curve.
        marks_x, marks_y: (position, text, colour) of dashed lines across.
    """

    title: str
    x_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    bytes_x: bool = False
    fixed_x: Sequence[tuple[float, str]] = ()
    lines: list[Line] = field(default_factory=list)
    bars: list[tuple[float, float, float, str]] = field(default_factory=list)
    bands: list[tuple[str, str]] = field(default_factory=list)
    marks_x: list[tuple[float, str, str]] = field(default_factory=list)
    marks_y: list[tuple[float, str, str]] = field(default_factory=list)
    legend: bool = True

    def x(self, value: float) -> float:
        share = _share(value, self.x_range, self.log_x)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def y(self, value: float) -> float:
        share = _share(value, self.y_range, self.log_y)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)

    def add(self, name: str, color: str, points: Iterable[tuple[float, float]], *,
            dots: Sequence[tuple[float, float, str]] = (), dashed: bool = False,
            thin: bool = False, above: int = 0) -> None:
        """Add a curve, in the units of the data.

        Args:
            thin: for many curves in one chart.
            above: curves that come after it; it is wider for them, so that one at the same place
                leaves its edges to be seen.
        """
        points = list(points)
        drawn = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        marks = [(self.x(x), self.y(y), text) for x, y, text in dots]
        said = f"{name} from {_number(points[0][1])} to {_number(points[-1][1])}" if points else ""
        width = 1.1 if thin else 2.0 + 1.6 * above
        self.lines.append(Line(name, color, drawn, marks, dashed, width, said))

    def add_bar(self, x: float, low: float, high: float, color: str) -> None:
        self.bars.append((self.x(x), self.y(low), self.y(high), color))

    def add_band(self, ends: Sequence[tuple[float, float, float]], color: str) -> None:
        """Add an area between (x, low, high), in the units of the data."""
        around = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        self.bands.append((" ".join(f"{self.x(x)},{self.y(y)}" for x, y in around), color))

    def mark_x(self, value: float, text: str, color: str = "var(--mark)") -> None:
        self.marks_x.append((self.x(value), text, color))

    def mark_y(self, value: float, text: str, color: str = "var(--mark)") -> None:
        self.marks_y.append((self.y(value), text, color))

    @property
    def ticks_x(self) -> list[tuple[float, str]]:
        if self.fixed_x:
            return [(self.x(value), text) for value, text in self.fixed_x]
        text = format_bytes if self.bytes_x else _number
        return [(self.x(v), text(v)) for v in _ticks(self.x_range, self.log_x, 6)]

    @property
    def ticks_y(self) -> list[tuple[float, str]]:
        return [(self.y(v), _number(v)) for v in _ticks(self.y_range, self.log_y, 6)]

    @property
    def said(self) -> str:
        """The chart for those who do not see it: its title, axis, and where each line leads."""
        courses = [line.said for line in self.named if line.said]
        text = f"{self.title}, by {self.x_label}"
        return f"{text}: {'; '.join(courses)}" if courses else text

    @property
    def named(self) -> list[Line]:
        """The lines of the legend."""
        return [line for line in self.lines if line.name] if self.legend else []


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` points: both ends, and the lowest and highest of every stretch between.

    So a spike of a single step stays as high as it was.
    """
    if len(points) <= most:
        return list(points)
    size = stretch(len(points), most)
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), size):
        places = range(begin, min(begin + size, len(points)))
        kept |= {min(places, key=lambda i: points[i][1]), max(places, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def stretch(count: int, most: int) -> int:
    """Points of which `thin` keeps two; 1 where it keeps all."""
    return 1 if count <= most else -(-2 * count // max(most - 2, 2))


def _channels(color: str) -> list[int]:
    return [int(color[i:i + 2], 16) for i in (1, 3, 5)]


def _mix(colors: Sequence[str], share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    first = min(int(place), len(colors) - 2)
    low, high = (_channels(colors[first + i]) for i in (0, 1))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(low, high))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def shade(share: float) -> str:
    """A colour between dark blue (0) and yellow (1), even in lightness; for areas."""
    return _mix(_SHADES, share)


def blend(share: float) -> str:
    """A colour between blue (0) and orange (1), to be seen on light and on dark paper; for lines.
    """
    return _mix(_BLENDS, share)


SCALE = tuple(shade(eighth / 8) for eighth in range(9))
"""The colours of a scale's bar, from 0 to 1."""


def ink_on(share: float) -> str:
    """Black or white, whichever reads better on `shade(share)`."""
    return "#111111" if share > 0.55 else "#ffffff"


def _share(value: float, limits: tuple[float, float], log: bool) -> float:
    low, high = limits
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def _ticks(limits: tuple[float, float], log: bool, most: int) -> list[float]:
    """Round numbers inside the limits, at most about `most`."""
    low, high = limits
    if not log:
        step = _round_step((high - low) / (most - 1)) if high > low else 1.0
        first = math.ceil(low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0 ** d for d in decades for f in factors]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[::math.ceil(len(found) / most)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (
            f"{value:.1e}".split("e"))
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def format_bytes(num_bytes: float) -> str:
    """A size in decimal units: 12.5 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} B"
