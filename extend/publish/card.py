"""The card of a repository, made from manifests and results alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from extend.adapter_format.serving_files import SERVING_JSON
from extend.adapter_format.sidecar import Sidecar, read_sidecar
from extend.evaluate.comparison import build_table, grid_tasks, to_markdown
from extend.evaluate.heatmap import build_panels, draw_heatmap
from extend.evaluate.summary_text import format_own, format_ruler
from extend.hub import HubId
from extend.model_config import read_config
from extend.page import shown
from extend.publish.facts import Row, in_words, residual_rows, rope_rows, sidecar_limits, stage_rows
from extend.publish.files import CARD, RECIPE, Folder
from extend.publish.loading import Lines, adapter_lines, model_lines
from extend.publish.metadata import Terms, card_data, eval_results, relation_of
from extend.publish.naming import Names
from extend.publish.provenance import ADAPTER, MODEL, RESULTS, Run, StageOutput
from extend.results import Results, format_length

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
IMAGES = "images"


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        outputs: what is published: one output, or all results of a run.
        lineage: the stages that led to it, itself last.
        results: evaluations that go with it.
    """

    run: Run

    repo: str
    kind: str
    outputs: Sequence[StageOutput]
    lineage: Sequence[StageOutput]
    results: Sequence[Results]
    names: Names
    terms: Terms
    tag: str | None

    @property
    def output(self) -> StageOutput:
        return self.outputs[-1]

    @property
    def bases(self) -> list[HubId]:
        """The models it was made from, each once; what was merged into, first."""
        targets = {str(entry["path"]) for output in self.lineage
                   for role, entry in output.manifest["inputs"].items() if role == "target"}
        ordered = sorted(self.names.bases, key=lambda path: path not in targets)
        return list(dict.fromkeys(self.names.ids[path] for path in ordered))

    @property
    def own_results(self) -> list[Results]:
        """The evaluations of this very output."""
        return [r for r in self.results if self._is_subject(r.data["model"])]

    def _is_subject(self, model: Mapping[str, Any]) -> bool:
        adapter = (model.get("adapter") or {}).get("sha256")
        return self.output.content == (adapter if self.kind == ADAPTER or adapter
                                       else model["sha256"])


def write_card(folder: Folder, subject: Subject) -> str:
    """Write README.md and its pictures into the folder; returns the text."""
    sidecar = read_sidecar(folder.root) if subject.kind == ADAPTER else None
    context = _context(folder, subject, sidecar)
    body = _template().render(
        title=subject.repo.partition("/")[2], rope=context,
        summary=_summary(subject, context), **_evaluation(folder, subject),
        residuals=residual_rows(sidecar) if sidecar else [],
        stages=[] if subject.kind == RESULTS else stage_rows(subject.lineage, subject.names),
        sources=_sources(subject), versions=_versions(subject.output), recipe=_recipe(folder),
        load=_load(folder, subject), limits=list(_limits(folder, subject, sidecar)),
        license=_license(subject))
    data = card_data(subject.kind, subject.repo, subject.terms, subject.bases,
                     relation_of(subject.kind, subject.output.stage), _tags(subject, sidecar),
                     eval_results(subject.own_results))
    text = f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"
    folder.write(CARD, text)
    return text


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, autoescape=False, finalize=shown)
    environment.filters["cell"] = _cell
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _context(folder: Folder, subject: Subject, sidecar: Sidecar | None) -> list[Row]:
    if subject.kind == RESULTS or (subject.kind == ADAPTER and sidecar is None):
        return []
    if sidecar:
        change = sidecar.rope
        return rope_rows(change.before, change.after, (change.max_position_embeddings_before,
                                                       change.max_position_embeddings_after))
    config = read_config(folder.root)
    changed = [o.manifest["results"] for o in subject.lineage
               if "rope_before" in o.manifest["results"]]
    before = changed[0]["rope_before"] if changed else None
    return rope_rows(before, config.rope.to_json(),
                     (before and before["original_len"], config.max_position_embeddings))


def _summary(subject: Subject, rope: Sequence[Row]) -> str:
    bases = " and ".join(_link(base) for base in subject.bases) or "its base"
    if subject.kind == RESULTS:
        tasks = ", ".join(grid_tasks(list(subject.results))) or "skills and losses"
        return f"Evaluations of long contexts ({tasks}): the prompts' results and a summary."
    if not rope:
        return f"A LoRA adapter for {bases}; it does not say for which RoPE it was made."
    before, after = (value.replace(",", "") for value in rope[0][1:])
    context = f"a context of {format_length(int(after))} tokens" \
        + (f" (before: {format_length(int(before))})" if before else "")
    if subject.kind == ADAPTER:
        return f"A LoRA adapter that gives {bases}, and fine-tunes of it, {context}."
    made = {"merge": "merged from", "train": "trained from"}.get(subject.output.stage, "made from")
    return f"A model {made} {bases}, with {context}."


def _link(base: HubId) -> str:
    commit = f" at `{base.revision}`" if base.revision else ""
    return f"[{base.repo}](https://huggingface.co/{base.repo}){commit}"


def _evaluation(folder: Folder, subject: Subject) -> dict[str, Any]:
    results = list(subject.results)
    if not results:
        return {"table": "", "subjects": [], "effective": [], "heatmaps": []}
    return {"table": to_markdown([r.label for r in results], build_table(results)),
            "subjects": [_describe(r, subject) for r in results],
            "effective": [line for r in results for line in _effective(r)],
            "heatmaps": list(_heatmaps(folder, results))}


def _describe(result: Results, subject: Subject) -> str:
    model = result.data["model"]
    adapter = model.get("adapter")
    what = _name(model, subject) + (f" with the adapter {_name(adapter, subject)}" if adapter
                                    else "")
    context = format_length(model["max_position_embeddings"])
    return f"{result.label}: {what}, {context} tokens of context by its config"


def _name(entry: Mapping[str, Any], subject: Subject) -> str:
    writer = subject.run.writer(entry)
    if writer is None or writer in subject.lineage:
        return subject.names.of(str(entry["path"]))
    return in_words(writer, subject.names)


def _effective(result: Results) -> Iterator[str]:
    summary, rules = result.data["summary"], result.data["summary"]["effective_lengths"]
    if rules.get("own"):
        yield (f"{result.label}: effective length by 85 % of its own short score: "
               f"{format_own(summary)}")
    if rules.get("ruler"):
        yield f"{result.label}: effective length by RULER's rule: {format_ruler(summary)}"


def _heatmaps(folder: Folder, results: list[Results]) -> Iterator[tuple[str, str]]:
    for name in grid_tasks(results):
        panels = build_panels(results, name)
        if panels:
            file = f"{IMAGES}/heatmap-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}"
            (folder.root / IMAGES).mkdir(exist_ok=True)
            draw_heatmap(panels, folder.root / f"{file}.png", name)
            (folder.root / f"{file}.svg").unlink()
            folder.note(f"{file}.png")
            yield name, f"{file}.png"


def _sources(subject: Subject) -> list[str]:
    return [f"the model {base.repo}: " + (f"commit `{base.revision}`" if base.pinned else
            f"revision {base.revision}" if base.revision else "its commit was not recorded")
            for base in subject.bases]


def _versions(output: StageOutput) -> str:
    return ", ".join(f"{name} {version}" for name, version in
                     output.manifest.get("versions", {}).items()
                     if version != "not installed" and name != "mergekit")


def _recipe(folder: Folder) -> str:
    path = folder.root / RECIPE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _load(folder: Folder, subject: Subject) -> list[Lines]:
    serving = folder.read_json(SERVING_JSON) if (folder.root / SERVING_JSON).is_file() else None
    if subject.kind == MODEL:
        return model_lines(subject.repo, serving, subject.tag)
    if subject.kind == ADAPTER and serving and subject.bases:
        return adapter_lines(subject.repo, _adapter_base(folder, subject), serving, subject.tag)
    return []


def _adapter_base(folder: Folder, subject: Subject) -> HubId:
    name = folder.read_json("adapter_config.json")["base_model_name_or_path"]
    return next((base for base in subject.bases if base.repo == name), subject.bases[0])


def _limits(folder: Folder, subject: Subject, sidecar: Sidecar | None) -> Iterator[str]:
    if sidecar:
        serving = folder.read_json(SERVING_JSON) if (folder.root / SERVING_JSON).is_file() else {}
        yield from sidecar_limits(sidecar, serving.get("unserved"))
    for result in subject.results:
        asked = [int(n) for task in result.data["summary"]["tasks"].values()
                 for n in task["lengths"]]
        longest, allowed = max(asked, default=0), result.native_len
        if 0 < longest < allowed:
            yield (f"{result.label}: nothing was measured beyond {format_length(longest)} tokens, "
                   f"although its config allows {format_length(allowed)}.")
        for warning in result.data["summary"].get("warnings", ()):
            yield f"{result.label}: {warning}."
    if not subject.own_results and subject.kind != RESULTS:
        yield "This very output was not evaluated" + (
            "; the table is of what it was made from or merged into." if subject.results else ".")
    else:
        yield ("Finding facts that were hidden in text is an easy test of a long context; it does "
               "not say that a model reasons over it.")


def _license(subject: Subject) -> str:
    terms = subject.terms
    if terms.license is None:
        return f"Licence: that of {subject.bases[0].repo}, whose card is asked when this is sent." \
            if subject.bases else "Licence: not known; give --license."
    name = f"[{terms.license_name}]({terms.license_link})" if terms.license_name and \
        terms.license_link else terms.license
    return f"Licence: {name}, {terms.source}."


def _tags(subject: Subject, sidecar: Sidecar | None) -> list[str]:
    methods = [str(o.manifest["options"]["method"]) for o in subject.lineage
               if o.stage == "rescale"]
    tags = ["long-context", "rope-scaling", "extend", *methods]
    if subject.kind == ADAPTER:
        tags += ["lora", *(f"base_model:adapter:{base.repo}" for base in subject.bases)]
    if subject.kind == RESULTS:
        tags = ["long-context", "evaluation", "extend"]
    return list(dict.fromkeys(tags))
