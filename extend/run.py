"""Run a recipe's stages in order; skip what is done, resume what was interrupted."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from extend.errors import CheckpointError, ExtendError, RecipeError
from extend.manifest import MANIFEST_NAME, hash_content, hash_file, outputs_intact
from extend.model_config import read_json
from extend.option_types import Options
from extend.options import input_paths, resolve_inputs
from extend.output import remove_directory, write_json
from extend.recipe import Recipe, Stage, load_recipe
from extend.recipe_inputs import input_path, is_pinned, pin_inputs
from extend.together import is_launched

logger = logging.getLogger(__name__)
RUN_RECORD = "run.json"


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


def _import(options: Any, out: Path) -> Path:
    from extend.gguf import import_gguf

    return import_gguf(**options.model_dump(), out=out, overwrite=True)


def _rescale(options: Any, out: Path) -> Path:
    from extend.rope import rescale

    return rescale(options.model, out, target_len=options.to, method=options.method,
                   from_len=options.from_len, sliding_window=options.sliding_window,
                   overwrite=True, **options.options)


def _train(options: Any, out: Path) -> Path:
    from extend.train import train

    return train(options, out, overwrite=True)


def _extract(options: Any, out: Path) -> Path:
    from extend.adapter import extract

    return extract(**options.model_dump(), out=out, overwrite=True)


def _cut(options: Any, out: Path) -> Path:
    from extend.adapter import cut

    return cut(**options.model_dump(), out=out, overwrite=True)


def _adapter_report(options: Any, out: Path) -> Path:
    from extend.adapter import adapter_report

    return adapter_report(**options.model_dump(), out=out, overwrite=True)


def _merge(options: Any, out: Path) -> Path:
    from extend.merge import merge

    return merge(**options.model_dump(), out=out, overwrite=True)


def _fit(options: Any, out: Path) -> Path:
    from extend.transfer import fit

    return fit(options, out, overwrite=True)


def _repair(options: Any, out: Path) -> Path:
    from extend.transfer import repair

    return repair(options, out, overwrite=True)


def _eval(options: Any, out: Path) -> Path:
    from extend.evaluate import evaluate

    return evaluate(**options.model_dump(), out=out, overwrite=True)


def _report(options: Any, out: Path) -> Path:
    from extend.evaluate import report

    return report(options.results, out, title=options.title, training=options.training,
                  overwrite=True)


def _publish(options: Any, out: Path) -> Path:
    from extend.publish import publish

    publish(**options.model_dump(), out=out, overwrite=True)
    return out


RUNNERS: dict[str, Callable[[Any, Path], Path]] = {
    "import": _import, "rescale": _rescale, "train": _train, "extract": _extract, "cut": _cut,
    "adapter-report": _adapter_report, "merge": _merge, "fit": _fit, "repair": _repair,
    "eval": _eval, "report": _report, "publish": _publish}


def run(recipe: Path | str, out: Path | str, *, overrides: Sequence[str] = ()) -> Path:
    """Run a recipe into `out`, one directory a stage; return `out`.

    A stage is skipped when it was run with the same options on inputs with the same content and
    its output is whole. An interrupted stage starts again, from its last checkpoint where it
    keeps one. The output of a stage stays until its successor is complete.

    Args:
        overrides: `KEY=VALUE`, changes to the recipe; see `extend.recipe_text.set_values`.

    Raises:
        RecipeError: the recipe is not valid, models that it names cannot be had from the Hub (all
            are asked for first), or torchrun or the like started several of this.
        CheckpointError: `out` cannot be written, or holds something in the place of an output.
        HubError: what a stage would publish may not be, by this token or without one.
        ExtendError: whatever a stage raises.
    """
    if is_launched():
        raise RecipeError("extend run starts the processes of each stage itself, but a launcher "
                          f"started {os.environ['WORLD_SIZE']} of it; start it alone, or for "
                          "several hosts `extend train --stage NAME` (docs/launch.md)")
    loaded = load_recipe(recipe, overrides=overrides)
    out = Path(out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: no such directory can be made ({error.strerror}); choose "
                              "another --out") from None
    _check_destinations(loaded, out)
    loaded = pin_inputs(loaded)
    for number, stage in enumerate(loaded.stages, start=1):
        label = f"[{number}/{len(loaded.stages)}] {stage.name} ({stage.kind})"
        _run_stage(stage, loaded, out, label)
    return out


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
    record, running, decisions = _read_record(out), set(), []
    for stage in recipe.stages:
        known, directory = record.get(stage.name, {}), out / stage.name
        _check_ours(directory, known)
        waits = sorted({value for _, value in input_paths(stage.options)} & running)
        if waits and _made_with(directory, known) is not None:
            decision = Decision(stage, "open", f"again, unless {' and '.join(waits)} "
                                               f"come{'s' * (len(waits) == 1)} out as before")
        elif waits or not known:
            decision = Decision(stage, "run")
        else:
            decision = _decide(stage, directory, known,
                               _fingerprint(stage, _resolve(stage, recipe, out)))
        decisions.append(decision)
        if decision.action != "skip":
            running.add(stage.name)
    return decisions


def _check_destinations(recipe: Recipe, out: Path) -> None:
    """See that what will be published may be, before hours of work."""
    for stage in recipe.stages:
        if stage.kind == "publish" and not (out / stage.name).exists():
            from extend.publish import check_destination

            check_destination(stage.options)


def _decide(stage: Stage, directory: Path, known: dict[str, Any], fingerprint: str) -> Decision:
    made_with = _made_with(directory, known)
    problem = None if made_with is None else outputs_intact(directory)
    if made_with == fingerprint and problem is None:
        return Decision(stage, "skip", "done already")
    if made_with not in (None, fingerprint):
        problem = "its options or inputs have changed"
    if problem:
        return Decision(stage, "again", f"because {problem}")
    if known.get("started") == fingerprint and any(path.exists() for path in _leftovers(directory)):
        return Decision(stage, "resume", "from where it was interrupted")
    return Decision(stage, "run")


def _resolve(stage: Stage, recipe: Recipe, out: Path) -> Options:
    """The stage's options with every input as a path."""
    names = {s.name for s in recipe.stages}
    return resolve_inputs(stage.options, lambda value: str(
        out / value if value in names else input_path(recipe, value)))


def _run_stage(stage: Stage, recipe: Recipe, out: Path, label: str) -> None:
    options = _resolve(stage, recipe, out)
    fingerprint = _fingerprint(stage, options)
    directory, record = out / stage.name, _read_record(out)
    known = record.get(stage.name, {})
    _check_ours(directory, known)
    decision = _decide(stage, directory, known, fingerprint)
    if decision.action == "skip":
        logger.info("%s: done already, skipped", label)
        if known["started"] == fingerprint:
            _remove_leftovers(directory)
        return
    logger.info("%s%s", label, f": again, {decision.reason}" if decision.action == "again" else "")
    if known.get("started") != fingerprint:
        _remove_leftovers(directory)
    _write_record(out, {**record, stage.name: {
        "started": fingerprint, "found": {"fingerprint": _made_with(directory, known),
                                          "manifest": _manifest_hash(directory)}}})
    try:
        RUNNERS[stage.kind](options, directory)
    except ExtendError as error:
        raise type(error)(f"{stage.name}: {error}") from error


def _check_ours(directory: Path, known: dict[str, Any]) -> None:
    """A stage replaces its own output, and nothing else."""
    if not known and directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already, but {RUN_RECORD} beside it knows of "
                              "no such output; choose another --out, or move it away")


def _made_with(directory: Path, known: dict[str, Any]) -> str | None:
    """The fingerprint that the output in `directory` was made with; None when there is none.

    A stage puts its output in place in one step, and no two manifests are the same. So one that
    was not found when the stage was last started is that start's.
    """
    manifest = _manifest_hash(directory)
    if manifest is None:
        return None
    found = known["found"]
    return found["fingerprint"] if manifest == found["manifest"] else known["started"]


def _manifest_hash(directory: Path) -> str | None:
    manifest = directory / MANIFEST_NAME
    return hash_file(manifest) if manifest.is_file() else None


def _leftovers(directory: Path) -> list[Path]:
    """Where a stage keeps what it is not done with, beside its output."""
    return [directory.with_name(name) for name in (
        f"{directory.name}.state", f".{directory.name}.rows", f".{directory.name}.parts",
        f".{directory.name}.partial", f".{directory.name}.old")]


def _remove_leftovers(directory: Path) -> None:
    for path in _leftovers(directory):
        remove_directory(path)


def _read_record(out: Path) -> dict[str, Any]:
    return read_json(out / RUN_RECORD) if (out / RUN_RECORD).exists() else {}


def _write_record(out: Path, record: dict[str, Any]) -> None:
    try:
        write_json(out / RUN_RECORD, record)
    except OSError as error:
        raise CheckpointError(f"{out / RUN_RECORD}: cannot be written ({error.strerror}); free "
                              "space or choose another --out") from None


def _fingerprint(stage: Stage, options: Options) -> str:
    """Hash of the stage's options, with each path replaced by its content's hash.

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
