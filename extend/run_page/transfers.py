"""What was taken out of the long model and put into its siblings: adapters and merges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.adapter.report_page import (
    REPORT_JSON,
    Group,
    HeatMap,
    facts_of,
    group_modules,
    heat_maps,
    kinds_of,
    notes_of,
    size_charts,
    spectrum_chart,
)
from extend.model_config import read_json
from extend.page.chart import Chart
from extend.results import format_length
from extend.run_page.story import StageStory, Story
from extend.run_page.words import flat, short_path

MOST_LAYERS = 48  # rows of a map
MOST_SPECTRA = 24  # lines of a chart
_MAPS = ("Size of the change", "Rank", "Residual")


@dataclass(frozen=True, slots=True)
class AdapterStory:
    """An adapter: what its own report says, shortened."""

    stage: StageStory
    facts: Sequence[tuple[str, str, str]]
    notes: Sequence[str]
    sizes: Sequence[Chart]
    maps: Sequence[HeatMap]
    spectra: Sequence[Chart]
    thinned: Sequence[str]
    left_out: Sequence[str]


@dataclass(frozen=True, slots=True)
class MergeStory:
    """A merge: (name, value) of how, what changed, and what was not known.

    Attributes:
        verdicts: (of what, the lineage's verdict in words, whether it warns).
    """

    stage: StageStory
    how: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str]]
    verdicts: Sequence[tuple[str, str, bool]]
    notes: Sequence[str]


def adapters_of(story: Story) -> list[AdapterStory]:
    """Every adapter that a stage wrote."""
    found = (story.gaps.attempt(f"{s.name}, its spectra", _read_adapter, s)
             for s in story.of("extract", "cut"))
    return [adapter for adapter in found if adapter]


def _read_adapter(stage: StageStory) -> AdapterStory:
    data = read_json(stage.directory / REPORT_JSON)
    groups = group_modules(data["modules"])
    kinds, layers = kinds_of(groups), sorted({g.layer for g in groups if g.layer is not None})
    rows, each = _joined(groups, len(layers))
    thinned = []
    if each > 1:
        thinned.append(f"a row of the maps is the mean of {each} layers and has the first's number")
    if len(layers) > MOST_SPECTRA:
        thinned.append(f"spectra of {MOST_SPECTRA} of {len(layers)} layers are drawn")
    maps = [heat for heat in heat_maps(rows, kinds) if heat.title in _MAPS and (
        heat.low != heat.high or heat.title != "Rank")]
    return AdapterStory(
        stage, facts_of(data), notes_of(data), size_charts(data), maps,
        [spectrum_chart(kind, groups, MOST_SPECTRA) for kind in kinds], thinned,
        list(data["left_out"]))


def _joined(groups: Sequence[Group], layers: int) -> tuple[list[Group], int]:
    """Several neighbouring layers as one where there are very many; how many."""
    each = -(-layers // MOST_LAYERS)
    if each <= 1:
        return list(groups), 1
    found: dict[tuple[int | None, str], list[Any]] = {}
    for group in groups:
        layer = None if group.layer is None else group.layer // each * each
        found.setdefault((layer, group.kind), []).extend(group.modules)
    return [Group(layer, kind, modules) for (layer, kind), modules in found.items()], each


def merges_of(story: Story) -> list[MergeStory]:
    """Every merge, and what it did to its target."""
    found = (story.gaps.attempt(f"{s.name}, its merge", _read_merge, s, story)
             for s in story.of("merge"))
    return [merge for merge in found if merge]


def _read_merge(stage: StageStory, story: Story) -> MergeStory:
    options, results = stage.manifest["options"], stage.results
    weight = options["weight"]
    how = [("method", str(options["method"])),
           ("weight", ", ".join(map(str, weight)) if isinstance(weight, list) else str(weight)),
           *flat({"option": options.get("options") or {}}),
           ("weights of layers", _layer_weights(stage, options.get("layer_weights"))),
           ("sidecar (norms, biases, embeddings)",
            "applied" if options.get("sidecar") else "left out"),
           ("dtype", options.get("dtype") or "each tensor's own")]
    changed = [("tensors written", f"{results['tensors']:,}"),
               ("matrices with a low-rank delta", f"{results['modules']:,}"),
               ("tensors with a delta of the sidecar", f"{results['sidecar_tensors']:,}"),
               ("tensors with a long model's whole difference", f"{results['raw_tensors']:,}"),
               ("tensors of the sidecar left out", f"{results['sidecar_left_out']:,}"),
               ("rope_theta", f"{results['rope_theta']:,.10g}"),
               ("context", f"{format_length(results['max_position_embeddings'])} tokens")]
    verdicts = [(_source(label, story), found["verdict"], found["kind"] in ("heavy", "other-run"))
                for label, found in (results.get("lineage") or {}).items()]
    if not verdicts:
        story.gaps.add(f"{stage.name}, lineage", "nothing is known of the base of its deltas; "
                       "`extend lineage TARGET --base BASE` measures it")
    if "conflict" not in results:
        story.gaps.add(f"{stage.name}, conflict of the deltas",
                       "a merge does not measure it; `extend lineage TARGET --base BASE --adapter "
                       "ADAPTER` does")
    notes = [*results.get("vocabulary", []),
             *(f"dropped buffer {name}" for name in results.get("dropped_buffers", []))]
    return MergeStory(stage, how, changed, verdicts, notes)


def _layer_weights(stage: StageStory, value: Any) -> str:
    if "layer_weights" in stage.inputs:
        return f"from {short_path(stage.inputs['layer_weights']['path'])}"
    if value is None:
        return "1 for all"
    text = ", ".join(f"{k} {v}" for k, v in flat(value)) if isinstance(value, Mapping) else (
        ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 300 else f"{text[:297]}..."


def _source(label: str, story: Story) -> str:
    made = story.stage_at(label)
    return f"the base of {made.name}" if made is not None else label
