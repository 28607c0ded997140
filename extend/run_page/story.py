"""What a run directory holds, stage by stage, and what is missing in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, ExtendError
from extend.manifest import MANIFEST_NAME, outputs_intact, read_manifest
from extend.model_config import read_json
from extend.run_record import (
    DONE,
    FAILED,
    INTERRUPTED,
    RECIPE_RECORD,
    RUN_RECORD,
    RUNNING,
    UNCHECKED,
    read_entries,
)

WAITING, GONE, UNKNOWN = "waiting", "gone", "unknown"
_WORDS = {
    DONE: "done", FAILED: "failed", INTERRUPTED: "interrupted", WAITING: "not reached",
    RUNNING: "not finished", UNCHECKED: "done before", GONE: "output gone",
    UNKNOWN: "not finished"}
_WHY = {
    WAITING: "the run has not reached it",
    RUNNING: "it was started, and had not ended when this page was written",
    UNKNOWN: "it was started, and no output lies there",
    INTERRUPTED: "it was stopped by hand",
    UNCHECKED: "a stage before it has run again since, so it may be made again",
    GONE: "it was done, but its output is not there any more"}
# What reading files from outside may raise that is no fault of this package.
_DAMAGE = (ExtendError, OSError, ArithmeticError, LookupError, TypeError, ValueError,
           AttributeError)


@dataclass(slots=True)
class Gaps:
    """What the page cannot show, each with the reason."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, why: str) -> None:
        self.found.append((what, why))

    def attempt(self, what: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` returns; None where files are damaged or of another form, which is told."""
        try:
            return make(*arguments)
        except _DAMAGE as error:
            said = str(error) if isinstance(error, ExtendError) else (
                f"{type(error).__name__}: {error}")
            self.add(what, f"cannot be shown: {said}")
            return None


@dataclass(frozen=True, slots=True)
class StageStory:
    """One stage of a run.

    Attributes:
        kind: a key of `STAGES`.
        options: as the recipe wrote them; empty where no recipe is kept.
        entry: what run.json says.
        manifest: of the output that this run made; None without one.
        damage: what is wrong with that output.
    """

    number: int
    name: str
    kind: str
    options: Mapping[str, Any]
    state: str
    entry: Mapping[str, Any]
    directory: Path
    manifest: Mapping[str, Any] | None = None
    damage: str | None = None

    @property
    def course(self) -> tuple[str | None, str | None, int]:
        """When it was last started, when it ended, how often it was started."""
        return self.entry.get("began"), self.entry.get("ended"), self.entry.get("starts", 1)

    @property
    def words(self) -> str:
        return _WORDS.get(self.state, self.state)

    @property
    def why(self) -> str | None:
        """What a reader must know about a stage that is not simply done."""
        said = self.entry.get("error") or _WHY.get(self.state)
        return said or self.damage

    @property
    def results(self) -> Mapping[str, Any]:
        return (self.manifest or {}).get("results", {})

    @property
    def inputs(self) -> Mapping[str, Mapping[str, str]]:
        return (self.manifest or {}).get("inputs") or {}

    @property
    def seconds(self) -> float | None:
        """Wall time of the start that made the output; else from its start to its end, if known."""
        if self.manifest is not None:
            return self.manifest.get("wall_seconds")
        began, ended = self.entry.get("began"), self.entry.get("ended")
        if not began or not ended:
            return None
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()

    @property
    def host_bytes(self) -> int | None:
        """Peak of the host: of all its processes in training, else of the one that did the work."""
        metrics = self.results.get("metrics") or {}
        return metrics.get("host_memory_bytes") or self._peaks.get("host")

    @property
    def gpu_bytes(self) -> int | None:
        """Peak of the GPU that held most; None where none was used."""
        return max((size for name, size in self._peaks.items() if name.startswith("cuda")),
                   default=None)

    @property
    def _peaks(self) -> Mapping[str, int]:
        return (self.manifest or {}).get("peak_memory_bytes") or {}

    @property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        return (self.manifest or {}).get("outputs") or {}


@dataclass(frozen=True, slots=True)
class Story:
    """A run: its stages in order, what was asked for (`recipe.json`), and what is missing."""

    out: Path
    recipe: Mapping[str, Any] | None
    stages: Sequence[StageStory]
    gaps: Gaps

    @property
    def name(self) -> str:
        return self.recipe["name"] if self.recipe else self.out.name

    def of(self, *kinds: str) -> list[StageStory]:
        """The stages of some kinds that have an output."""
        return [s for s in self.stages if s.kind in kinds and s.manifest is not None]

    def stage_at(self, path: str) -> StageStory | None:
        """The stage whose output a path is, or lies in.

        A directory may have been moved since, so a stage counts by the end of the path too.
        """
        parts = Path(path).parts
        return next((s for s in self.stages if s.name in parts[-2:]
                     and Path(*parts[:parts.index(s.name)]).name == self.out.name), None)


def read_story(out: Path) -> Story:
    """Read the records and manifests of a run directory.

    Raises:
        CheckpointError: it is none, or its run.json or recipe.json is damaged.
    """
    if not (out / RUN_RECORD).is_file() and not (out / RECIPE_RECORD).is_file():
        raise CheckpointError(f"{out}: holds no {RUN_RECORD}; give the --out of `extend run`")
    entries, gaps = read_entries(out), Gaps()
    recipe = read_json(out / RECIPE_RECORD) if (out / RECIPE_RECORD).is_file() else None
    if recipe is None:
        gaps.add("recipe", "the run is of a version that did not keep it; run it again with the "
                           "same --out, and done stages are only looked at")
    asked = recipe["stages"] if recipe else [{"name": name} for name in entries]
    stages = [_read_stage(out, number, dict(stage), entries.get(stage["name"], {}), gaps)
              for number, stage in enumerate(asked, start=1)]
    return Story(out, recipe, stages, gaps)


def _read_stage(out: Path, number: int, asked: Mapping[str, Any], entry: Mapping[str, Any],
                gaps: Gaps) -> StageStory:
    name, directory = asked["name"], out / asked["name"]
    there = (directory / MANIFEST_NAME).is_file()
    state = entry.get("state") or (DONE if there else UNKNOWN if entry else WAITING)
    manifest = damage = None
    if state in (DONE, UNCHECKED) and there:
        manifest = gaps.attempt(f"{name}/{MANIFEST_NAME}", read_manifest, directory)
        damage = manifest and gaps.attempt(f"{name}, its files", outputs_intact, directory)
    elif state in (DONE, UNCHECKED):
        state = GONE
    kind = asked.get("stage") or (manifest or {}).get("stage", "unknown")
    return StageStory(number, name, kind, asked.get("options", {}), state, entry, directory,
                      manifest, damage)
