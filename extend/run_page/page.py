"""Put the page together and write it in one step."""

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.manifest import MANIFEST_NAME
from extend.output import write_text
from extend.page import render
from extend.page.chart import SCALE, format_bytes
from extend.results import format_length
from extend.run_page.evaluations import Evaluations, evaluations_of
from extend.run_page.planned import planned_of
from extend.run_page.ropes import Rope, rope_charts, ropes_of
from extend.run_page.story import DONE, WAITING, StageStory, Story, read_story
from extend.run_page.trainings import trainings_of
from extend.run_page.transfers import adapters_of, merges_of
from extend.run_page.words import duration, flat, gib, short_hash, short_path, when

PAGE_NAME = "index.html"
MOST_BYTES = 4 * 2**20
"""What the page of any run stays below: curves, spectra, maps and lists of files are bounded."""
_TEMPLATE = Path(__file__).with_name("run.html.jinja")
_MARK = '<meta name="generator" content="extend run">'
_HEAVY = ("adapters", "trainings", "evaluations")  # in the order in which they go
_MOST_FILES = 40  # listed of a stage
_MOST_RECIPE = 60_000  # characters
_LINKED = ("*.html", "*.md", "results.json", "report.json", "fit.json", "weights.json", "*.png",
           "metrics.jsonl", MANIFEST_NAME)
_TOLD = ("train", "extract", "cut", "merge", "eval", "report", "rescale", "adapter-report")


def write_run_page(out: Path | str) -> Path:
    """Write index.html, the page of the run in `out`, and return its path.

    The file is replaced in one step, and only when it changes. It is one HTML file that loads
    nothing; links to the reports of stages are relative. It stays below `MOST_BYTES`.

    Raises:
        CheckpointError: `out` is no directory of a run, its records are damaged, or index.html
            cannot be written or is not of `extend run`.
    """
    out = Path(out).absolute()
    path, page = out / PAGE_NAME, render_run_page(read_story(out))
    old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if old is not None and _MARK not in old[:2000]:
        raise CheckpointError(f"{path}: was not written by `extend run`; move it away, or the page "
                              "of the run has no place")
    if old != page:
        try:
            write_text(path, page)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space or "
                                  "make the directory writable") from None
    return path


def render_run_page(story: Story) -> str:
    """The page as text.

    Curves, maps and lists are bounded one by one. Where a run has so many stages that they are
    too much together, whole parts are left to the stages' own reports, and named as missing.
    """
    gaps = story.gaps
    ropes = gaps.attempt("RoPE", ropes_of, story) or []
    parts = {
        "ropes": ropes, "evaluations": gaps.attempt("evaluation", evaluations_of, story),
        "rope_charts": (gaps.attempt("RoPE, its drawing", rope_charts, ropes) or []) if ropes
        else [],
        "trainings": trainings_of(story), "adapters": adapters_of(story),
        "merges": merges_of(story), "planned": planned_of(story),
        "machines": _machines(story)}
    _name_missing(story, parts)
    page = _fill(story, parts)
    for part in _HEAVY:
        if len(page.encode()) > MOST_BYTES and parts[part]:
            parts[part] = []
            gaps.add(part, "left to the stages' own reports: with it the page would be larger than "
                           f"{MOST_BYTES / 2**20:g} MiB")
            page = _fill(story, parts)
    return page


def _fill(story: Story, parts: Mapping[str, Any]) -> str:
    return render(
        _TEMPLATE, title=f"Run {story.name}", story=story, **parts,
        facts=_facts(story, parts["ropes"], parts["evaluations"]), troubles=_troubles(story),
        others=[s for s in story.stages if s.manifest is not None and s.kind not in _TOLD],
        reports=story.of("report", "adapter-report"),
        versions=_versions(story), scale=SCALE,
        links={stage.name: links_of(stage) for stage in story.stages},
        files=_files, share=_time_shares(story), recipe_text=_recipe_text(story),
        options=_options, duration=duration, gib=gib, when=when, short_path=short_path,
        short_hash=short_hash, flat=flat, format_length=format_length, format_bytes=format_bytes)


def _facts(story: Story, ropes: Sequence[Rope],
           evaluations: Evaluations | None) -> list[tuple[str, str, str]]:
    """(value, name, detail) of what stands at the top; what is not known is left to the gaps."""
    done = sum(s.state == DONE for s in story.stages)
    known = [s.seconds for s in story.stages if s.seconds is not None]
    facts = [(f"{done} of {len(story.stages)}", "stages done", _stopped(story)),
             (duration(sum(known)), "wall time", f"of {_stages(len(known))}")]
    made = [r.made_for for r in ropes if r.made_for]
    if made:
        facts.append((f"{format_length(ropes[0].spec.original_len)} to {format_length(max(made))}",
                      "context, tokens", "what the RoPE was trained on, and is made for"))
    if evaluations:
        facts += _effective(evaluations)
    tokens = sum((s.results.get("metrics") or {}).get("tokens", 0) for s in story.of("train"))
    if tokens:
        facts.append((f"{tokens:,}", "tokens trained", f"in {_stages(len(story.of('train')))}"))
    gpu = [s.gpu_bytes for s in story.stages if s.gpu_bytes]
    host = [s.host_bytes for s in story.stages if s.host_bytes]
    if gpu or host:
        facts.append((gib(max(gpu or host)), f"most memory of {'a GPU' if gpu else 'a host'}",
                      f"of a host {gib(max(host))}" if gpu and host else "no GPU was used"))
    return facts


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


def _effective(evaluations: Evaluations) -> list[tuple[str, str, str]]:
    known = {label: text for label in evaluations.labels
             if (text := evaluations.effective_words(label))}
    before = next((label for label in known if label not in evaluations.made), None)
    after = next((label for label in reversed(known) if label in evaluations.made), None)
    shown = [label for label in (before, after) if label is not None]
    return [(" to ".join(known[label] for label in shown), "effective length",
             f"of {' and of '.join(shown)}")] if shown else []


def _stopped(story: Story) -> str:
    stopped = next((s for s in story.stages if s.state not in (DONE, WAITING)), None)
    if stopped is not None:
        return f"{stopped.name}: {stopped.words}"
    waiting = sum(s.state == WAITING for s in story.stages)
    return f"{waiting} not reached" if waiting else "nothing is missing"


def _troubles(story: Story) -> list[StageStory]:
    """The stages whose state must be read first."""
    return [s for s in story.stages if s.state not in (DONE, WAITING) or s.damage]


def _name_missing(story: Story, parts: Mapping[str, Any]) -> None:
    """Say of every part of the story that the page lacks, why it does."""
    kinds: dict[str, tuple[str, ...]] = {
        "trainings": ("train",), "adapters": ("extract", "cut"), "merges": ("merge",),
        "evaluations": ("eval",), "ropes": ("rescale", "train")}
    what = {"trainings": "training", "adapters": "adapter", "merges": "merge",
            "evaluations": "evaluation", "ropes": "RoPE before and after"}
    for part, wanted in kinds.items():
        stages = [s for s in story.stages if s.kind in wanted]
        if not parts[part] and not stages:
            story.gaps.add(what[part], "the recipe has no stage that would tell it")
    for stage in story.stages:
        if stage.manifest is None and stage.why:
            story.gaps.add(f"{stage.name} ({stage.kind})", stage.why)


def links_of(stage: StageStory) -> list[tuple[str, str]]:
    """(relative address, file name) of what a stage left for people to read."""
    if stage.manifest is None:
        return []
    there = sorted(os.listdir(stage.directory))
    found = dict.fromkeys(name for pattern in _LINKED for name in there if fnmatch(name, pattern))
    return [(f"{stage.name}/{name}", name) for name in found]


def _files(stage: StageStory) -> tuple[list[tuple[str, Mapping[str, Any]]], int]:
    """The largest files of an output, and how many are not listed."""
    files = sorted(stage.outputs.items(), key=lambda item: -item[1]["bytes"])
    return files[:_MOST_FILES], max(0, len(files) - _MOST_FILES)


def _options(stage: StageStory) -> list[tuple[str, str]]:
    """The options that a stage was run with; long ones are cut."""
    options = stage.options or (stage.manifest or {}).get("options", {})
    return [(key, text if len(text) <= 400 else f"{text[:397]}...")
            for key, text in flat(options) if key != "cells"]


def _time_shares(story: Story) -> Callable[[StageStory], float]:
    longest = max((s.seconds or 0.0 for s in story.stages), default=0.0) or 1.0
    return lambda stage: round(100 * (stage.seconds or 0.0) / longest, 1)


def _recipe_text(story: Story) -> str | None:
    if story.recipe is None:
        return None
    text = story.recipe["text"]
    return text if len(text) <= _MOST_RECIPE else f"{text[:_MOST_RECIPE]}\n... (cut here)"


def _versions(story: Story) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Package -> its versions, each with the stages that ran with it."""
    return _alike(story, lambda stage: (stage.manifest or {}).get("versions") or {})


def _machines(story: Story) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    def read(stage: StageStory) -> dict[str, str]:
        machine = (stage.manifest or {}).get("machine")
        if not machine:
            return {}
        gpus = machine.get("gpus") or []
        counts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
        return {"processor": f"{machine['processor']}, {machine['cores']} cores",
                "memory": gib(machine["memory_bytes"]), "GPUs": ", ".join(counts) or "none used",
                "system": machine["system"]}

    found = story.gaps.attempt("hardware", _alike, story, read) or []
    if not found and any(s.manifest for s in story.stages):
        story.gaps.add("hardware", "the stages ran with a version that did not record it")
    return found


def _alike(story: Story,
           read: Callable[[StageStory], Mapping[str, str]]) -> list[tuple[str, list]]:
    """Name -> values with the stages that have each."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage in story.stages:
        for name, value in read(stage).items():
            found.setdefault(name, {}).setdefault(value, []).append(stage.name)
    return [(name, list(values.items())) for name, values in found.items()]
