"""Every evaluation of a run side by side: what models could before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from extend.evaluate.comparison import TableRow, build_table, grid_tasks
from extend.evaluate.heatmap import MOST_CELLS, Panel, build_panels
from extend.evaluate.plots import loss_plots, score_plots
from extend.evaluate.report import refresh
from extend.evaluate.summary_text import reached
from extend.page.chart import Chart
from extend.results import RESULTS_NAME, Results, format_length, format_rate, read_results
from extend.run_page.story import StageStory, Story
from extend.run_page.words import short_path

_EFFECTIVE = "effective length"


@dataclass(frozen=True, slots=True)
class Map:
    """The heat maps of one task.

    Attributes:
        panels: (panel, its scores by length in words).
        rows: of the table, score by length.
        charts: score by length.
    """

    name: str
    panels: Sequence[tuple[Panel, str]]
    rows: Sequence[TableRow]
    charts: Sequence[Chart]
    stream: bool


@dataclass(frozen=True, slots=True)
class Evaluations:
    """What the eval stages found.

    Attributes:
        models: label -> (which model that is, the stage that asked it).
        made: labels of models that stages of this run wrote.
        effective, rest: rows of tables; `rest` by section.
        warnings: (label, what to know before believing it).
    """

    labels: Sequence[str]
    models: Mapping[str, tuple[str, StageStory]]
    made: frozenset[str]
    effective: Sequence[TableRow]
    maps: Sequence[Map]
    rest: Sequence[tuple[str, Sequence[TableRow]]]
    losses: Sequence[Chart]
    warnings: Sequence[tuple[str, str]]
    results: Sequence[Results]

    def about(self, label: str) -> str:
        """Which model a label stands for, unless the label says so itself."""
        words = self.models[label][0]
        return "" if words == label else words

    def effective_words(self, label: str) -> str | None:
        """The effective length of a model, `2K or more`; None where it is not known."""
        result = next(r for r in self.results if r.label == label)
        own = result.data["summary"]["effective_lengths"]["own"]
        if own is None:
            return None
        rule = result.data["summary"]["tasks"][own["limited_by"]]["own_rule"]
        return reached({**own, "longest_asked": rule["longest_asked"]})


def evaluations_of(story: Story) -> Evaluations | None:
    """All results of the run; None without any. Damaged ones are told and left out."""
    found: list[Results] = []
    models: dict[str, tuple[str, StageStory]] = {}
    named = _labels(story)
    for stage in story.of("eval"):
        label = named.get(stage.name, stage.name)
        read = story.gaps.attempt(f"{stage.name}, its results", _read, stage, label)
        if read is not None:
            found.append(read)
            models[label] = (_model_words(stage, story), stage)
    if not found:
        return None
    return _compare(_in_order(found, list(named.values())), models, story)


def _read(stage: StageStory, label: str) -> Results:
    (result,) = read_results({label: stage.directory / RESULTS_NAME})
    return refresh(result)


def _labels(story: Story) -> dict[str, str]:
    """Stage -> label, from the recipe's reports; a label that is taken is not given again."""
    found: dict[str, str] = {}
    evals = {s.name for s in story.stages if s.kind == "eval"}
    for stage in story.stages:
        results = stage.options.get("results") if stage.kind == "report" else None
        for label, name in (results or {}).items():
            if name in evals and name not in found and label not in {*found.values(), *evals}:
                found[name] = label
    return found


def _in_order(results: Sequence[Results], labels: Sequence[str]) -> list[Results]:
    """As the recipe's reports list them, then as they were made."""
    place = {label: number for number, label in enumerate(labels)}
    return sorted(results, key=lambda r: place.get(r.label, len(place)))


def _model_words(stage: StageStory, story: Story) -> str:
    """What the model of an evaluation is to the run."""
    model = stage.inputs.get("model", {})
    made = story.stage_at(model.get("path", ""))
    if made is not None:
        words = f"{made.name} ({made.kind})"
    else:
        words = _role(model.get("sha256"), story) or short_path(model.get("path", "?"))
    adapter = stage.inputs.get("adapter")
    return words if adapter is None else f"{words} with {short_path(adapter['path'])}"


def _role(sha256: str | None, story: Story) -> str | None:
    """Part of a model from outside: the base, or the sibling before its merge."""
    for kind, role, words in (("extract", "base", "base"), ("rescale", "model", "base"),
                              ("merge", "target", "sibling before the merge"),
                              ("train", "model", "before training")):
        if any(s.inputs.get(role, {}).get("sha256") == sha256 for s in story.of(kind)):
            return words
    return None


def _compare(results: list[Results], models: Mapping[str, tuple[str, StageStory]],
             story: Story) -> Evaluations:
    table = story.gaps.attempt("evaluation, its table", build_table, results) or []
    tasks = grid_tasks(results)
    sections: dict[str, list[TableRow]] = {}
    for row in [*table, *_short_losses(results)]:
        sections.setdefault(row.section, []).append(row)
    rest = [(name, rows) for name, rows in sections.items() if name not in (*tasks, _EFFECTIVE)]
    losses = story.gaps.attempt("loss by position", loss_plots, results) or []
    return Evaluations(
        [r.label for r in results], models,
        frozenset(label for label, (_, stage) in models.items()
                  if story.stage_at(stage.inputs.get("model", {}).get("path", ""))),
        sections.get(_EFFECTIVE, []),
        _maps(results, tasks, sections, story), rest, [plot.chart() for plot in losses],
        [(r.label, warning) for r in results for warning in r.data["summary"]["warnings"]],
        results)


def _short_losses(results: Sequence[Results]) -> list[TableRow]:
    """Loss on the short text that divergences were measured on, and its change."""
    names = dict.fromkeys(name for r in results for name in r.data["summary"]["divergences"])
    entries = {r.label: r.data["summary"]["divergences"] for r in results}
    return [TableRow("loss", f"{name}, loss in nats a token", {
        label: _loss(found.get(name)) for label, found in entries.items()}) for name in names]


def _loss(entry: Mapping[str, Any] | None) -> str | None:
    if entry is None or entry.get("loss") is None:
        return None
    text, change = f"{entry['loss']:.4f}", entry.get("difference")
    error = entry.get("difference_stderr")
    spread = "" if error is None else f" +/- {error:.4f}"
    return text if change is None else f"{text} ({change:+.4f}{spread} against the reference)"


def _maps(results: list[Results], tasks: Sequence[str],
          sections: Mapping[str, Sequence[TableRow]], story: Story) -> list[Map]:
    """One for each task; without panels once the page holds enough squares."""
    found, left = [], MOST_CELLS
    for name in tasks:
        panels = story.gaps.attempt(f"{name}, its heat maps", build_panels, results, name) or []
        cells = sum(len(panel.lengths) * len(panel.depths) for panel in panels)
        if cells > left:
            story.gaps.add(f"{name}, its heat maps",
                           f"they have {cells:,} squares, and the page holds {MOST_CELLS:,}; "
                           f"`extend report` draws them from {RESULTS_NAME}")
            panels = []
        left -= cells if panels else 0
        plots = story.gaps.attempt(f"{name}, its curves", score_plots, results, [name]) or []
        stream = any(r.data["summary"]["tasks"].get(name, {}).get("stream") for r in results)
        found.append(Map(name, [(panel, _said(results, name, panel.label)) for panel in panels],
                         sections.get(name, []),
                         [replace_title(p.chart(), name) for p in plots if p.title == name],
                         stream))
    return found


def replace_title(chart: Chart, name: str) -> Chart:
    """The same chart under a name that says what it shows."""
    return replace(chart, title=f"{name}, mean score by length")


def _said(results: Sequence[Results], name: str, label: str) -> str:
    """A panel in words: the score at each length."""
    result = next(r for r in results if r.label == label)
    lengths: Mapping[str, Any] = result.data["summary"]["tasks"][name]["lengths"]
    return ", ".join(f"{format_rate(entry)} at {format_length(int(length))}"
                     for length, entry in lengths.items())
