"""The page of an adapter's report: what `report.json` says, as charts and tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.adapter.report_quality import quality_charts, quality_table, reference_of
from extend.page import render
from extend.page.chart import PALETTE, SCALE, Chart, blend, format_bytes, ink_on, shade

REPORT_JSON = "report.json"  # beside the adapter
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj",
          "gate_up_proj", "down_proj")
_MAX_LINE_POINTS = 40
_FAR = 1000.0  # times the noise edge

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The modules of one kind in one layer: one of a dense model, all experts of a mixture."""

    layer: int | None
    kind: str
    modules: Sequence[Data]

    def mean(self, key: str) -> float | None:
        found = [m[key] for m in self.modules if m[key] is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    tip: str
    color: str
    ink: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Layers by kinds of modules; `rows` are (layer, cells), a cell None where there is nothing."""

    title: str
    note: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    low: str
    high: str


def render_page(data: Data) -> str:
    """The whole page.

    Args:
        data: the content of report.json.
    """
    groups = group_modules(data["modules"])
    kinds = kinds_of(groups)
    return render(
        _TEMPLATE, title=_title(data), data=data, facts=facts_of(data), notes=notes_of(data),
        maps=heat_maps(groups, kinds), size_charts=size_charts(data),
        quality_charts=quality_charts(data), quality=quality_table(data["measured"]),
        reference=reference_of(data["measured"]),
        spectra=[spectrum_chart(kind, groups) for kind in kinds],
        groups=groups, scale=SCALE, percent=percent,
        number=_short, format_bytes=format_bytes)


def _title(data: Data) -> str:
    tuned, base = data["adapter"]["tuned"], data["adapter"]["base"]
    return f"Adapter of {_last(tuned or base)}" + (f" over {_last(base)}" if tuned else "")


def _last(path: str | None) -> str:
    return Path(path).name if path else "an unnamed base"


def group_modules(modules: Mapping[str, Data]) -> list[Group]:
    """The `modules` of report.json by layer and kind, in order."""
    found: dict[tuple[int | None, str], list[Data]] = {}
    for name, entry in modules.items():
        found.setdefault((entry["layer"], entry["kind"]), []).append({"name": name, **entry})
    groups = [Group(layer, kind, entries) for (layer, kind), entries in found.items()]
    return sorted(groups, key=lambda g: (g.layer is None, g.layer or 0, _kind_key(g.kind)))


def kinds_of(groups: Sequence[Group]) -> list[str]:
    """The kinds of modules, in the order of a layer."""
    return sorted({g.kind for g in groups}, key=_kind_key)


def _kind_key(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def percent(share: float | None) -> str:
    """Three digits: 58.3 %; a dash for what is not known."""
    if share is not None and 0 < share < 1e-6:
        return "< 0.0001 %"
    return "-" if share is None else f"{100 * share:.3g} %"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def facts_of(data: Data) -> list[tuple[str, str, str]]:
    """(value, name, detail) of what stands at the top."""
    adapter, totals = data["adapter"], data["totals"]
    low, high = totals["ranks"]
    side = f"and {format_bytes(adapter['sidecar_bytes'])} of sidecar" \
        if adapter["sidecar_bytes"] else "no sidecar"
    return [
        (format_bytes(adapter["adapter_bytes"]), "adapter", side),
        (str(low) if low == high else f"{low} to {high}", "rank",
         f"of {totals['modules']} modules, mean {totals['mean_rank']:.3g}"),
        (percent(totals["energy"]), "of the squared norm kept", "of all linear deltas together"),
        (_short(totals["mean_residual"]), "mean residual", f"largest {totals['max_residual']:.3g}"),
        (percent(totals["noise_share"]), "rounding in the delta",
         "of its squared norm, expected from the stored dtype"),
        (percent(totals["merge_loss"]), "lost by merging in 16 bits",
         "of the adapter's norm, by rounding W + B A")]


def notes_of(data: Data) -> list[str]:
    """What the numbers mean, in sentences."""
    totals, lines = data["totals"], []
    if data["adapter"]["tuned"] is None:
        lines.append("This adapter has no sidecar, so the delta that it stands for is not known: "
                     "shares are of the adapter itself.")
    noise = totals["noise_share"]
    if noise is not None and noise > 0.02:
        lines.append(f"About {percent(min(noise, 1.0))} of the squared norm of the deltas is the "
                     "rounding of the stored weights. An adapter that leaves it out loses nothing "
                     "that was learned, so a residual of up to "
                     f"{min(noise, 1.0) ** 0.5:.2g} may cost nothing.")
    loss = totals["merge_loss"]
    if loss is not None and loss > 0.02:
        lines.append(f"A merge stored in 16 bits rounds {percent(loss)} of the adapter's norm away "
                     "again. One stored in float32, or the adapter beside the model, keeps it.")
    return lines


def heat_maps(groups: Sequence[Group], kinds: Sequence[str]) -> list[HeatMap]:
    """What is known of every module, a map each."""
    return [heat for heat in (
        _heat_map("Size of the change", "||dW|| / ||W||", "relative_norm", percent, groups, kinds),
        _heat_map("Rank", "of the factors", "rank", lambda v: f"{v:.0f}", groups, kinds),
        _heat_map("Residual", "||dW - B A|| / ||dW||", "residual", lambda v: f"{v:.2f}", groups,
                  kinds),
        _heat_map("Rounding in the delta", "share of ||dW||², expected", "noise_share", percent,
                  groups, kinds),
        _heat_map("Lost by merging", "rounding of W + B A to 16 bits, of ||B A||", "merge_loss",
                  percent, groups, kinds)) if heat is not None]


def _heat_map(title: str, note: str, key: str, text: Callable[[float], str],
              groups: Sequence[Group], kinds: Sequence[str]) -> HeatMap | None:
    known = {(g.layer, g.kind): (g, value) for g in groups if (value := g.mean(key)) is not None}
    if not known:
        return None
    values = [value for _, value in known.values()]
    low, high = min(values), max(values)

    def cell(layer: int | None, kind: str) -> Cell | None:
        if (layer, kind) not in known:
            return None
        group, value = known[layer, kind]
        share = (value - low) / (high - low) if high > low else 0.5
        many = f", mean of {len(group.modules)}" if len(group.modules) > 1 else ""
        return Cell(text(value).replace(" ", ""),
                    f"{group.modules[0]['name']}: {text(value)}{many}", shade(share), ink_on(share))

    layers = dict.fromkeys(g.layer for g in groups)
    rows = [("-" if layer is None else str(layer), [cell(layer, kind) for kind in kinds])
            for layer in layers]
    return HeatMap(title, note, [kind.replace("_proj", "") for kind in kinds], rows, text(low),
                   text(high))


def size_charts(data: Data) -> list[Chart]:
    curves, here = data["curve"], data["adapter"]["adapter_bytes"]
    sizes = [point["adapter_bytes"] for points in curves.values() for point in points]
    limits = (min(sizes) * 0.95, max(*sizes, here) * 1.05)
    charts = []
    for title, key in (("Squared norm kept", "energy"), ("Mean residual", "mean_residual")):
        chart = Chart(title, "bytes of the adapter file", limits, (0.0, 1.0), log_x=True,
                      bytes_x=True)
        for name, rule, color in (("cut at one singular value", "threshold", PALETTE[0]),
                                  ("equal ranks", "equal_rank", PALETTE[1])):
            chart.add(name, color, [(p["adapter_bytes"], p[key]) for p in curves[rule]])
        chart.add("this adapter", "var(--ink)", [], dots=[(
            here, _here(data, key), f"this adapter: {_here(data, key):.3g}")])
        noise = data["totals"]["noise_share"]
        if noise is not None and 0.02 < noise < 1:
            level = 1 - noise if key == "energy" else noise ** 0.5
            chart.mark_y(level, "all but the rounding")
        charts.append(chart)
    return charts


def _here(data: Data, key: str) -> float:
    return data["totals"][key]


def spectrum_chart(kind: str, groups: Sequence[Group], most_lines: int | None = None) -> Chart:
    """Singular values by rank, a line a layer, in units of the noise edge where it is known.

    Args:
        most_lines: draw so many at most, of layers spread evenly from the first to the last.
    """
    groups = [g for g in groups if g.kind == kind]
    if most_lines is not None and len(groups) > most_lines:
        groups = [groups[round(i * (len(groups) - 1) / (most_lines - 1))]
                  for i in range(most_lines)]
    edges = all(m["noise_edge"] for g in groups for m in g.modules)
    lines = [_mean_spectrum(g, edges) for g in groups]
    values = [v for line in lines for _, v in line if v > 0] or [1.0]
    near = edges and min(values) < _FAR  # else the mark would press the lines together
    low, high = min(*values, 1.0 if near else max(values)), max(values)
    low = max(low, high * 1e-6)
    longest = max(rank for line in lines for rank, _ in line)
    chart = Chart(kind, "rank", (1, max(longest, 2)), (low / 1.2, high * 1.2), log_y=True,
                  legend=False)
    for i, line in enumerate(lines):
        chart.add(f"layer {groups[i].layer}", blend(i / max(1, len(lines) - 1)), line, thin=True)
    if near and chart.y_range[0] < 1 < chart.y_range[1]:
        chart.mark_y(1.0, "rounding")
    return chart


def _mean_spectrum(group: Group, edges: bool) -> list[tuple[float, float]]:
    """(rank, value) of a group; of experts the one whose change is largest."""
    module = max(group.modules, key=lambda m: m["delta_norm"])
    unit = module["noise_edge"] if edges else module["delta_norm"] or 1.0
    pairs = list(zip(module["spectrum"]["rank"], module["spectrum"]["value"]))
    return [(rank, value / unit) for rank, value in _thinned(pairs)]


def _thinned(pairs: Sequence[Any]) -> Iterable[Any]:
    step = max(1, -(-len(pairs) // _MAX_LINE_POINTS))
    return [*pairs[:-1:step], pairs[-1]]
