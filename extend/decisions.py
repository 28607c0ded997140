"""What a run would do with each stage of a recipe, from its options, its inputs and its output."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from extend.errors import CheckpointError, RecipeError
from extend.manifest import MANIFEST_NAME, hash_content, hash_file, outputs_intact
from extend.option_types import Options
from extend.options import input_paths, resolve_inputs
from extend.recipe import Recipe, Stage, load_recipe
from extend.recipe_inputs import input_path, is_pinned, pin_inputs
from extend.run_record import RUN_RECORD, read_entries


@dataclass(frozen=True, slots=True)
class Decision:
    """What a run does with a stage.

    Attributes:
        action: run: from the start; again: over an output that is there; resume: from what an
            interruption left; skip: nothing; open: again or skip, which shows when the stages
            before it are done.
        reason: why, where that needs saying.
    """

    stage: Stage
    action: Literal["run", "again", "resume", "skip", "open"]
    reason: str = ""


def decide(recipe: Path | str, out: Path | str, *,
           overrides: Sequence[str] = ()) -> list[Decision]:
    """What `run` would do with each stage of a recipe now; nothing is written or fetched.

    Args:
        overrides: as of `run`.

    Raises:
        RecipeError: the recipe is not valid, or models that it names cannot be had from the Hub.
        CheckpointError: `out` holds something in the place of an output.
    """
    loaded = pin_inputs(load_recipe(recipe, overrides=overrides), fetch=False)
    return decide_stages(loaded, Path(out).absolute())


def decide_stages(recipe: Recipe, out: Path) -> list[Decision]:
    """As `decide`, for a recipe that is read already and whose models are pinned."""
    record, running, decisions = read_entries(out), set(), []
    for stage in recipe.stages:
        known, directory = record.get(stage.name, {}), out / stage.name
        check_ours(directory, known)
        waits = sorted({value for _, value in input_paths(stage.options)} & running)
        if waits and made_with_of(directory, known) is not None:
            decision = Decision(stage, "open", f"again, unless {' and '.join(waits)} "
                                               f"come{'s' * (len(waits) == 1)} out as before")
        elif waits or not known:
            decision = Decision(stage, "run")
        else:
            decision = decide_stage(stage, directory, known,
                                    fingerprint_of(stage, resolve(stage, recipe, out)))
        decisions.append(decision)
        if decision.action != "skip":
            running.add(stage.name)
    return decisions


def decide_stage(stage: Stage, directory: Path, known: dict[str, Any],
                 fingerprint: str) -> Decision:
    """The same for one stage whose inputs are there.

    Args:
        known: its entry in run.json.
        fingerprint: of the options and inputs that it would run with now.
    """
    made_with = made_with_of(directory, known)
    problem = None if made_with is None else outputs_intact(directory)
    if made_with == fingerprint and problem is None:
        return Decision(stage, "skip", "done already")
    if made_with not in (None, fingerprint):
        problem = "its options or inputs have changed"
    if problem:
        return Decision(stage, "again", f"because {problem}")
    if known.get("started") == fingerprint and any(
            path.exists() for path in leftovers_of(directory)):
        return Decision(stage, "resume", "from where it was interrupted")
    return Decision(stage, "run")


def resolve(stage: Stage, recipe: Recipe, out: Path) -> Options:
    """The stage's options with every input as a path."""
    names = {s.name for s in recipe.stages}
    return resolve_inputs(stage.options, lambda value: str(
        out / value if value in names else input_path(recipe, value)))


def check_ours(directory: Path, known: dict[str, Any]) -> None:
    """A stage replaces its own output, and nothing else."""
    if not known and directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already, but {RUN_RECORD} beside it knows of "
                              "no such output; choose another --out, or move it away")


def made_with_of(directory: Path, known: dict[str, Any]) -> str | None:
    """The fingerprint that the output in `directory` was made with; None when there is none.

    A stage puts its output in place in one step, and no two manifests are the same. So one that
    was not found when the stage was last started is that start's.
    """
    manifest = manifest_hash(directory)
    if manifest is None:
        return None
    found = known["found"]
    return found["fingerprint"] if manifest == found["manifest"] else known["started"]


def manifest_hash(directory: Path) -> str | None:
    """The sha256 of an output's manifest; None where there is none."""
    manifest = directory / MANIFEST_NAME
    return hash_file(manifest) if manifest.is_file() else None


def leftovers_of(directory: Path) -> list[Path]:
    """Where a stage keeps what it is not done with, beside its output."""
    return [directory.with_name(name) for name in (
        f"{directory.name}.state", f".{directory.name}.rows", f".{directory.name}.parts",
        f".{directory.name}.partial", f".{directory.name}.old")]


def fingerprint_of(stage: Stage, options: Options) -> str:
    """Hash of the stage's options, with each input path replaced by its content's hash.

    A commit of a repository stands for its content.
    """
    hashes = {}
    for location, value in input_paths(options):
        if Path(value).exists():
            hashes[value] = hash_content(value)
        elif is_pinned(value):
            hashes[value] = value
        else:
            raise RecipeError(f"{stage.name}: {'.'.join(map(str, location))}: {value} does not "
                              "exist")
    data = resolve_inputs(options, lambda value: hashes[value]).model_dump(mode="json")
    text = json.dumps({"stage": stage.kind, "options": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
