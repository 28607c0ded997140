"""How a published directory came about: the stages of its run, found by the content they read.

A manifest names an input by path and by the hash of its content. The path is of this machine; the
hash leads to the stage that wrote it, wherever the run lies now.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, RecipeError
from extend.hub import HubId, is_repo_id
from extend.manifest import MANIFEST_NAME, read_manifest, recorded_content
from extend.model_config import read_json
from extend.results import RESULTS_NAME
from extend.run_record import RECIPE_RECORD

ADAPTER, MODEL, RESULTS = "adapter", "model", "results"
_MODEL_ROLES = re.compile(r"(model|base|tuned|target|merged|reference|rope_from|adapters?"
                          r"(\[\d+\]|\.\d+)?)")


@dataclass(frozen=True)
class StageOutput:
    """A directory that a stage wrote, with its manifest."""

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @cached_property
    def content(self) -> str:
        return recorded_content(self.manifest)

    @property
    def kind(self) -> str | None:
        """What it would be published as; None for the output of another stage."""
        found = self.manifest["outputs"]
        if "adapter_config.json" in found:
            return ADAPTER
        if "config.json" in found and any(n.endswith(".safetensors") for n in found):
            return MODEL
        return RESULTS if RESULTS_NAME in found else None


@dataclass(frozen=True)
class Source:
    """An input that no stage of the run wrote.

    Attributes:
        stage: name of the stage that read it.
        entry: what its manifest says of it: path, content hash, and the repository if known.
    """

    stage: str
    role: str
    entry: Mapping[str, Any]

    @property
    def path(self) -> str:
        return str(self.entry["path"])

    @property
    def is_model(self) -> bool:
        return _MODEL_ROLES.fullmatch(self.role) is not None

    @property
    def is_start(self) -> bool:
        """Whether the card must name it: what the output was made from, not what it was taught."""
        return self.role in ("model", "base", "target", "merged")

    @property
    def recorded(self) -> HubId | None:
        """The repository that the manifest, or the path in the Hub's cache, tells of."""
        repo = self.entry.get("repo") or self.entry.get("repo_id")
        if repo:
            return HubId(str(repo), self.entry.get("revision") or self.entry.get("commit"))
        return HubId.of_cache(self.path)


@dataclass(frozen=True)
class Run:
    """The outputs that lie beside one another, and the recipe if the run kept it."""

    directory: Path
    stages: Sequence[StageOutput]
    recipe: Mapping[str, Any] | None = None
    _by_content: dict[str, StageOutput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for output in self.stages:
            self._by_content[output.content] = output
            for entry in output.manifest["outputs"].values():  # of inputs that are a single file
                self._by_content.setdefault(entry["sha256"], output)

    def writer(self, entry: Mapping[str, Any]) -> StageOutput | None:
        """The stage whose output an input is."""
        return self._by_content.get(entry["sha256"])

    def ancestors(self, output: StageOutput) -> list[StageOutput]:
        """The stages that led to an output, it included, each after what it read."""
        found: dict[Path, StageOutput] = {}

        def visit(current: StageOutput) -> None:
            for entry in current.manifest["inputs"].values():
                before = self.writer(entry)
                if before is not None and before.directory not in found and before is not current:
                    visit(before)
            found.setdefault(current.directory, current)

        visit(output)
        return list(found.values())

    def sources(self, outputs: Sequence[StageOutput]) -> list[Source]:
        """What stages read that no stage of the run wrote; once for each path."""
        found: dict[str, Source] = {}
        for output in outputs:
            for role, entry in output.manifest["inputs"].items():
                if self.writer(entry) is None:
                    found.setdefault(str(entry["path"]), Source(output.name, role, entry))
        return list(found.values())

    @staticmethod
    def base_of(adapter: StageOutput) -> Source:
        """The base that an adapter's own config names."""
        config = read_json(adapter.directory / "adapter_config.json")
        path = str(config.get("base_model_name_or_path"))
        on_hub = is_repo_id(path) and not Path(path).exists()
        known = {"repo": path, "revision": config.get("revision")} if on_hub else {}
        return Source(adapter.name, "base", {"path": path, **known})

    @property
    def results(self) -> list[StageOutput]:
        return [output for output in self.stages if output.kind == RESULTS]


def read_output(directory: Path) -> StageOutput:
    """The output in a directory.

    Raises:
        CheckpointError: no manifest, or not one of a stage.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no {MANIFEST_NAME}, from which its card would be "
                              "made; give the output of a stage, or the directory of a run")
    return StageOutput(directory, read_manifest(directory))


def read_run(directory: Path) -> Run:
    """All stages' outputs in a directory."""
    stages = [read_output(path.parent)
              for path in sorted(directory.glob(f"*/{MANIFEST_NAME}"))]
    recipe = directory / RECIPE_RECORD
    return Run(directory, stages, read_json(recipe) if recipe.is_file() else None)


def find(source: Path, kind: str | None) -> tuple[Run, list[StageOutput]]:
    """The run that `source` is or lies in, and what of it to publish: one output, or all results.

    Raises:
        CheckpointError: nothing of a stage is there.
        RecipeError: not of the kind that was asked for, or several are.
    """
    source = Path(os.path.abspath(source))  # `..` would be no name of an output
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory; give the output of a stage, or the "
                              "directory of a run")
    if not (source / MANIFEST_NAME).is_file() and any(source.glob(f"*/{MANIFEST_NAME}")):
        run = read_run(source)
        return run, _choose(run, kind)
    output = read_output(source)
    if output.kind is None or kind not in (None, output.kind):
        raise RecipeError(f"{source}: holds {output.kind or f'the output of {output.stage}'}, and "
                          f"{kind or 'an adapter, a model or results'} was to be published; give "
                          "another directory")
    run = read_run(source.parent)
    return run, [next(o for o in run.stages if o.directory == source)]


def _choose(run: Run, kind: str | None) -> list[StageOutput]:
    for wanted in [kind] if kind else [ADAPTER, MODEL, RESULTS]:
        found = run.results if wanted == RESULTS else list(_last_of(run, wanted))
        if len(found) > 1 and wanted != RESULTS:
            raise RecipeError(f"{run.directory}: holds {len(found)} outputs of kind {wanted} that "
                              f"nothing else was made from: {', '.join(o.name for o in found)}; "
                              f"give one of them, such as {run.directory / found[0].name}")
        if found:
            return found
    raise RecipeError(f"{run.directory}: holds no {kind or 'adapter, model or results'}; it has "
                      f"{', '.join(f'{o.name} ({o.stage})' for o in run.stages)}")


def _last_of(run: Run, kind: str) -> Iterator[StageOutput]:
    """The outputs of a kind that no other output of that kind was made from."""
    candidates = [output for output in run.stages if output.kind == kind]
    used = {before.directory for output in candidates for before in run.ancestors(output)
            if before is not output}
    yield from (output for output in candidates if output.directory not in used)
