"""The part of the report's page that sets measured quality against the size of the adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

from extend.page.chart import PALETTE, Chart, format_bytes
from extend.results import format_length, format_rate

Data = Mapping[str, Any]


def quality_charts(data: Data) -> list[Chart]:
    """One chart a task with a line for each length, and one of all skills; none without sizes."""
    measured = data["measured"]
    sized = [m for m in measured if m["adapter_bytes"] is not None]
    sizes = [m["adapter_bytes"] for m in sized]
    if not sizes:
        return []
    limits = (min(sizes) * 0.8, max(sizes) * 1.25)
    tasks = dict.fromkeys(_title(score) for m in measured for score in m["scores"])
    return [_chart(title, limits, sized, reference_of(measured)) for title in tasks]


def _title(score: Data) -> str:
    return "skills" if score["length"] is None else score["task"]


def _name(score: Data) -> str:
    return score["task"] if score["length"] is None else format_length(score["length"])


def reference_of(measured: Sequence[Data]) -> Data | None:
    """The first model without an adapter: others are compared with it."""
    return next((m for m in measured if m["adapter_bytes"] is None), None)


def _chart(title: str, limits: tuple[float, float], sized: Sequence[Data],
           reference: Data | None) -> Chart:
    chart = Chart(title, "bytes of the adapter file", limits, (0.0, 1.0), log_x=True, bytes_x=True)
    names = dict.fromkeys(_name(s) for m in sized for s in m["scores"] if _title(s) == title)
    for number, name in enumerate(names):
        color = PALETTE[number % len(PALETTE)]
        found = [(m, s) for m in sized for s in m["scores"]
                 if _title(s) == title and _name(s) == name]
        chart.add(name, color, [(m["adapter_bytes"], s["score"]) for m, s in found],
                  dots=[(m["adapter_bytes"], s["score"], f"{m['label']}: {format_rate(s)}")
                        for m, s in found])
        for m, s in found:
            chart.add_bar(m["adapter_bytes"], s["wilson_low"], s["wilson_high"], color)
        for s in reference["scores"] if reference else ():
            if _title(s) == title and _name(s) == name:
                chart.add("", color, [(x, s["score"]) for x in limits], dashed=True)
    return chart


def quality_table(measured: Sequence[Data]) -> dict[str, Any]:
    """`heads` (label, detail) of the columns, and `rows` (measure, cells); a cell None if absent.
    """
    heads = [(m["label"], _detail(m)) for m in measured]
    scores = [{_measure(s): format_rate(s) for s in m["scores"]} for m in measured]
    losses = [{f"{name}, nats a token": f"{loss:.3f}" for name, loss in m["losses"].items()}
              for m in measured]
    cells = [{**a, **b} for a, b in zip(scores, losses)]
    return {"heads": heads, "rows": [(measure, [entry.get(measure) for entry in cells])
                                     for measure in dict.fromkeys(k for e in cells for k in e)]}


def _measure(score: Data) -> str:
    return score["task"] if score["length"] is None else f"{score['task']} at {_name(score)}"


def _detail(measured: Data) -> str:
    if measured["adapter_bytes"] is None:
        return "no adapter"
    weight = "" if measured["weight"] == 1 else f", weight {measured['weight']:g}"
    return f"rank {measured['rank']}, {format_bytes(measured['adapter_bytes'])}{weight}"
