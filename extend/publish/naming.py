"""Public names for what manifests call by local paths: repositories of the Hub, stages, files."""

import html
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath

from extend.errors import RecipeError
from extend.hub import HubId
from extend.publish.provenance import ADAPTER, RESULTS, Run, Source, StageOutput

_HERE = "."  # the directory of the run
_ROOT_ROLES = ("model", "base")  # what a chain of stages starts from
_BEFORE_A_PATH = (r'"(?:path|base|tuned|base_model_name_or_path)": "|"serve",\s+"'
                  r'|"--model-path",\s+"|vllm serve |--model-path ')


class Names:
    """Path on this machine -> public name.

    Attributes:
        ids: of models on the Hub, by path.
        bases: paths of those that the published outputs were made from.
    """

    def __init__(self, ids: Mapping[str, HubId], public: Mapping[str, str],
                 bases: Collection[str] = ()):
        self.ids, self.bases, self._public = dict(ids), tuple(bases), dict(public)
        self._spelled = {spelling: name for path, name in public.items() if _has_folder(path)
                         for spelling in (path, json.dumps(path)[1:-1], html.escape(path))}

    def pinned(self, ids: Mapping[str, HubId]) -> "Names":
        """The same with other revisions of some models."""
        return Names({**self.ids, **ids}, self._public, self.bases)

    def apply(self, text: str) -> str:
        """The text with every known path replaced by its public name.

        A path of one word, such as `base`, is replaced only where a path must be meant.
        """
        there = sorted((path for path in self._spelled if path in text), key=len, reverse=True)
        if there:
            found = "|".join(map(re.escape, there))
            text = re.sub(rf"(?<![\w.-])({found})(?![\w.~+-])(/(?=\w))?", self._rename, text)
        for path, name in self._public.items():
            if not _has_folder(path) and path != name:
                text = re.sub(rf"({_BEFORE_A_PATH}){re.escape(path)}(?![\w.~+-])",
                              lambda found, name=name: found[1] + name, text)
        return text

    def _rename(self, found: re.Match[str]) -> str:
        name, slash = self._spelled[found[1]], found[2] or ""
        return "" if name == _HERE and slash else name + slash

    def of(self, path: str) -> str:
        """The public name of a path: the repository, the stage, or the last part of it."""
        return self._public.get(path) or PurePath(path).name

    @property
    def local(self) -> list[str]:
        """All paths that are known to be of this machine."""
        return [path for path, name in self._public.items() if path != name]


def _has_folder(path: str) -> bool:
    return len(PurePath(path).parts) > 1


def name_all(run: Run, outputs: Sequence[StageOutput], *, base_id: str | None,
             ids: Mapping[str, str]) -> Names:
    """Name everything that the manifests of a run speak of.

    Args:
        outputs: what is published.
        base_id: of the model that the chain of stages starts from.
        ids: path, or the end of one, to repository.

    Raises:
        RecipeError: a model that is no output of the run has no name on the Hub, or an id that
            was given fits nothing.
    """
    lineage = [before for output in outputs for before in run.ancestors(output)]
    given = {key: HubId.parse(value, f"the id of {key}") for key, value in ids.items()}
    base = HubId.parse(base_id, "the base's id") if base_id else None
    starts = run.sources(lineage)
    if not any(s.is_start for s in starts):  # an adapter whose extraction is not here
        starts += [run.base_of(output) for output in outputs if output.kind == ADAPTER]
    sources = list({s.path: s for s in [*starts, *run.sources(run.stages)]}.values())
    needed = {s.path for s in starts
              if s.is_start and any(o.kind != RESULTS for o in outputs)}
    roots = _roots(starts)
    named: dict[str, HubId] = {}
    used: set[str] = set()
    for source in sources:
        key = next((k for k in given if _fits(source.path, k)), None)
        used |= {key} if key else set()
        found = given.get(key or "") or (
            base if base and source.path in roots else None) or source.recorded
        if found is not None:
            named[source.path] = found
    _check_given(given, used, base, base_id, roots, sources)
    missing = {s.path: s for s in sources if s.path in needed and s.path not in named}
    _check_needed(list(missing.values()))
    merged = {s.path for s in starts if s.role.startswith(ADAPTER) and s.path in named}
    return Names(named, _public(run, sources, named), [*sorted(needed), *sorted(merged)])


def _roots(sources: Sequence[Source]) -> set[str]:
    """Path of the model that the chain of stages starts from, if one alone can be meant."""
    bases = {s.path for s in sources if s.role == "base"}
    models = {s.path for s in sources if s.role in _ROOT_ROLES}
    return bases or (models if len(models) == 1 else set())


def _fits(path: str, key: str) -> bool:
    """Whether a path is the one given, or ends in it."""
    parts, wanted = PurePath(path).parts, PurePath(key).parts
    return path == key or (bool(wanted) and parts[-len(wanted):] == wanted)


def _check_given(given: Mapping[str, HubId], used: set[str], base: HubId | None,
                 base_id: str | None, roots: set[str], sources: Sequence[Source]) -> None:
    known = ", ".join(s.path for s in sources if s.is_model) or "none"
    for key in given:
        if key not in used:
            raise RecipeError(f"the id of {key}: no manifest of the run names such a model; they "
                              f"name {known}")
    if base and not roots:
        raise RecipeError(f"the base's id {base_id}: no manifest of the run names a base; they "
                          f"name {known}")


def _check_needed(missing: Sequence[Source]) -> None:
    if not missing:
        return
    lines = [f"{s.stage} was made from the {s.role} {s.path}, a local path" for s in missing]
    base = [s for s in missing if s.role in _ROOT_ROLES]
    advice = ["--base-id ORG/NAME[@COMMIT]"] if base else []
    advice += [f"--id {PurePath(s.path).name}=ORG/NAME[@COMMIT]" for s in missing
               if s not in base]
    raise RecipeError("; ".join(lines) + "; a card names models as they are on the Hub: add "
                      + " ".join(advice))


def _public(run: Run, sources: Sequence[Source], named: Mapping[str, HubId]) -> dict[str, str]:
    public = {}
    for source in sources:
        known = named.get(source.path)
        if known and source.path.partition("@")[0] == known.repo:  # it was read from the Hub
            public[source.path] = source.path
        else:
            public[source.path] = known.repo if known else PurePath(source.path).name
    for output in run.stages:
        for entry in output.manifest["inputs"].values():
            writer, path = run.writer(entry), str(entry["path"])
            if writer is None:
                continue
            parts = PurePath(path).parts  # as it lay when it was read: the run may have moved
            inside = writer.name in parts[:-1]
            public[path] = f"{writer.name}/{parts[-1]}" if inside else writer.name
            if writer.name in parts:
                last = len(parts) - 1 - parts[::-1].index(writer.name)
                public[str(PurePath(*parts[:last]))] = _HERE
        public[str(output.directory)] = output.name
    public[str(run.directory)] = _HERE
    if run.recipe and run.recipe.get("path"):
        public[str(run.recipe["path"])] = Path(run.recipe["path"]).name
    return public
