"""Run a recipe's stages in order; skip what is done, resume what was interrupted."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from extend.decisions import (
    check_ours,
    decide_stage,
    fingerprint_of,
    leftovers_of,
    made_with_of,
    manifest_hash,
    resolve,
)
from extend.errors import CheckpointError, ExtendError, RecipeError
from extend.lock import holding
from extend.manifest import hash_file
from extend.model_config import read_json
from extend.output import remove_directory, write_json
from extend.recipe import Recipe, Stage, load_recipe
from extend.recipe_inputs import pin_inputs
from extend.run_record import (
    DONE,
    FAILED,
    INTERRUPTED,
    PLAN_NAME,
    keep_recipe,
    note_end,
    note_skip,
    note_start,
    read_entries,
)
from extend.together import is_launched

logger = logging.getLogger(__name__)

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

    `out` also holds the recipe (recipe.json), what it was planned to take on this machine
    (plan.json), and index.html, the page of the run (`extend.run_page`), as of the last stage that
    was started or has ended.

    Args:
        overrides: `KEY=VALUE`, changes to the recipe; see `extend.recipe_text.set_values`.

    Raises:
        RecipeError: the recipe is not valid, models that it names cannot be had from the Hub (all
            are asked for first), or torchrun or the like started several of this.
        BusyError: another process runs a recipe into `out`, or a stage of this one.
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
    with holding(out, inside=True):
        _check_destinations(loaded, out)
        loaded = pin_inputs(loaded)
        keep_recipe(out, _describe(loaded))
        _keep_plan(out, loaded)
        for number, stage in enumerate(loaded.stages, start=1):
            label = f"[{number}/{len(loaded.stages)}] {stage.name} ({stage.kind})"
            _run_stage(stage, loaded, out, label)
        _refresh_page(out)
    return out


def _check_destinations(recipe: Recipe, out: Path) -> None:
    """See that what will be published may be, before hours of work."""
    for stage in recipe.stages:
        if stage.kind == "publish" and not (out / stage.name).exists():
            from extend.publish import check_destination

            check_destination(stage.options)


def _describe(recipe: Recipe) -> dict[str, Any]:
    """What is kept of a recipe beside what it gave."""
    text = "".join(f"# run with --set {change}\n" for change in recipe.overrides)
    text += recipe.path.read_text(encoding="utf-8")
    return {"schema": 1, "name": recipe.name, "path": str(recipe.path),
            "sha256": hash_file(recipe.path), "text": text, "overrides": list(recipe.overrides),
            "stages": [{"name": stage.name, "stage": stage.kind,
                        "options": stage.options.model_dump(mode="json", exclude_unset=True)}
                       for stage in recipe.stages]}


def _keep_plan(out: Path, recipe: Recipe) -> None:
    """Write what the recipe should take, for the page to set beside what it took; once a recipe.

    The run needs no plan, so one that cannot be made is told in its place.
    """
    path = out / PLAN_NAME
    made_of = {"recipe_sha256": hash_file(recipe.path), "overrides": list(recipe.overrides)}
    try:
        if path.is_file() and made_of.items() <= read_json(path).items():
            return
        from extend.recipe_plan import plan_json, plan_recipe

        found = plan_json(plan_recipe(recipe.path, run_dir=out, overrides=recipe.overrides))
    except Exception as error:
        logger.warning("the run cannot be planned (%s: %s)", type(error).__name__, error)
        found = {"stages": [], "problems": [f"the plan could not be made: {error}"]}
    with contextlib.suppress(OSError):  # the record, which comes next, tells of a full disk
        write_json(path, {**found, **made_of})


def _run_stage(stage: Stage, recipe: Recipe, out: Path, label: str) -> None:
    options = resolve(stage, recipe, out)
    fingerprint = fingerprint_of(stage, options)
    directory, known = out / stage.name, read_entries(out).get(stage.name, {})
    check_ours(directory, known)
    decision = decide_stage(stage, directory, known, fingerprint)
    if decision.action == "skip":
        logger.info("%s: done already, skipped", label)
        if known["started"] == fingerprint:
            _remove_leftovers(directory)
        note_skip(out, stage.name)
        return
    logger.info("%s%s", label, f": again, {decision.reason}" if decision.action == "again" else "")
    if known.get("started") != fingerprint:
        _remove_leftovers(directory)
    order = [s.name for s in recipe.stages]
    note_start(out, stage.name, fingerprint, {"fingerprint": made_with_of(directory, known),
                                              "manifest": manifest_hash(directory)},
               later=order[order.index(stage.name) + 1:])
    _refresh_page(out)
    with _noting_the_end(out, stage.name):
        RUNNERS[stage.kind](options, directory)


@contextlib.contextmanager
def _noting_the_end(out: Path, name: str) -> Iterator[None]:
    """Record how a stage ended, and put its name before what it raises for the user."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        state = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
        with contextlib.suppress(ExtendError):  # what stopped the stage may be a full disk
            note_end(out, name, state, _told(error))
        _refresh_page(out)
        if isinstance(error, ExtendError):
            raise type(error)(f"{name}: {error}") from error
        raise
    note_end(out, name, DONE)
    _refresh_page(out)


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, ExtendError) else f"{type(error).__name__}: {error}"


def _refresh_page(out: Path) -> None:
    """Write the page of the run; a stage's hours of work must not be lost for want of it."""
    try:
        from extend.run_page import write_run_page

        write_run_page(out)
    except Exception as error:
        logger.warning("the page of the run could not be written (%s: %s); `extend run-page %s` "
                       "tries again", type(error).__name__, error, out)


def _remove_leftovers(directory: Path) -> None:
    for path in leftovers_of(directory):
        remove_directory(path)
