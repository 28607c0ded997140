"""The report stage: several results side by side, as a page, heat maps and a table."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from extend.curves import read_courses
from extend.evaluate.comparison import (
    TableRow,
    build_differences,
    build_table,
    grid_tasks,
    to_markdown,
)
from extend.evaluate.effective import OWN_RULE, RULER_RULE
from extend.evaluate.heatmap import MOST_CELLS, build_panels, draw_heatmap
from extend.evaluate.plots import Plot, draw_plot, loss_plots, score_plots
from extend.evaluate.summary import format_chance, summarize
from extend.manifest import Manifest
from extend.output import atomic_directory, write_json
from extend.page import render
from extend.page.chart import SCALE
from extend.results import Results, format_length, read_results, reading_rows

SCHEMA = 1
_TEMPLATE = "report.html.jinja"


def report(results: Mapping[str, Path | str], out: Path | str, *, title: str = "",
           training: Path | str | None = None, overwrite: bool = False) -> Path:
    """Compare the results of several models and return the directory `out`.

    It holds index.html (one file, nothing loaded from elsewhere), each of its plots as PNG and SVG
    (heatmap-<task>, scores-<task>, loss-<task>), table.md and report.json.

    Args:
        results: label -> results.json or its directory; losses are compared with the first.
        title: of the page.
        training: checkpoint that `train` wrote, or its metrics.jsonl, for the loss curve.

    Raises:
        CheckpointError: results or metrics that cannot be read, or `out` exists.
        RecipeError: no results.
    """
    read = read_results(results)
    with reading_rows(read):
        read = [refresh(result) for result in read]
    courses = [] if training is None else read_courses(training)
    paths = {f"results.{r.label}": r.path for r in read}
    if training is not None:
        paths["training"] = Path(training)
    title = title or f"Context length of {', '.join(r.label for r in read)}"
    manifest = Manifest("report", paths, {"title": title})
    labels = [r.label for r in read]
    with reading_rows(read):
        table, differences = build_table(read), build_differences(read)
    with atomic_directory(out, overwrite=overwrite, inputs=paths) as partial:
        maps, plots = _write_heatmaps(read, partial), _write_plots(read, partial)
        markdown = to_markdown(labels, table) + (
            "\n" + to_markdown(labels[1:], differences, f"less {labels[0]}") if differences else "")
        (partial / "table.md").write_text(markdown, encoding="utf-8")
        write_json(partial / "report.json", _to_json(read, table, maps, plots, title))
        page = _render(title=title, results=read, labels=labels, table=_by_section(table),
                       differences=differences, maps=maps, plots=[plot for plot, _ in plots],
                       courses=courses)
        (partial / "index.html").write_text(page, encoding="utf-8")
        manifest.write(partial)
    return Path(out)


def refresh(result: Results) -> Results:
    """Results with the summary that this version makes of their rows."""
    tasks = result.data["summary"].get("tasks", {})
    chances = {name: task["chance"] for name, task in tasks.items()
               if task.get("chance") is not None}
    return replace(result, data={**result.data,
                                 "summary": summarize(result.data["rows"], chances)})


def _write_heatmaps(results: list[Results], directory: Path) -> list[dict[str, Any]]:
    """A PNG and an SVG a task; returns its name, file and panels.

    Of tasks for which the page has no room it shows the `picture` as it is.
    """
    maps: list[dict[str, Any]] = []
    left = MOST_CELLS
    for name in grid_tasks(results):
        panels = build_panels(results, name)
        if not panels:
            continue
        file = _file_name("heatmap", name, [entry["file"] for entry in maps])
        draw_heatmap(panels, directory / file, name)
        stream = any(r.data["summary"]["tasks"].get(name, {}).get("stream") for r in results)
        left -= (cells := sum(len(p.lengths) * len(p.depths) for p in panels))
        picture = _embed(directory / file) if left < 0 else None
        left += cells if picture else 0
        maps.append({"name": name, "file": file, "panels": panels, "stream": stream,
                     "picture": picture})
    return maps


def _embed(picture: Path) -> str:
    """The address of a PNG that a page carries itself."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _write_plots(results: list[Results], directory: Path) -> list[tuple[Plot, str]]:
    """A PNG and an SVG of each curve; returns it with its file."""
    drawn: list[tuple[Plot, str]] = []
    for plot in [*score_plots(results, grid_tasks(results)), *loss_plots(results)]:
        file = _file_name(plot.kind, plot.title, [file for _, file in drawn])
        draw_plot(plot, directory / file)
        drawn.append((plot, file))
    return drawn


def _file_name(kind: str, name: str, taken: Sequence[str]) -> str:
    """A file name from a label that may hold anything."""
    stem = f"{kind}-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "task")
    file, number = f"{stem}.png", 2
    while file in taken:
        file, number = f"{stem}-{number}.png", number + 1
    return file


def _by_section(table: list[TableRow]) -> list[tuple[str, list[TableRow]]]:
    sections: dict[str, list[TableRow]] = {}
    for row in table:
        sections.setdefault(row.section, []).append(row)
    return list(sections.items())


def _to_json(results: list[Results], table: list[TableRow], maps: list[dict[str, Any]],
             plots: list[tuple[Plot, str]], title: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "title": title,
        "results": {r.label: {"path": str(r.path), "sha256": r.sha256, "model": r.data["model"],
                              "summary": r.data["summary"]} for r in results},
        "table": [asdict(row) for row in table],
        "heatmaps": {entry["name"]: entry["file"] for entry in maps},
        "plots": [{"kind": plot.kind, "name": plot.title, "file": file} for plot, file in plots]}


def _render(**values: Any) -> str:
    return render(
        Path(__file__).with_name(_TEMPLATE), **values, scale=SCALE, rules=(OWN_RULE, RULER_RULE),
        format_length=format_length, format_chance=format_chance)
