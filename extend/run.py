"""Run a recipe's stages in order; skip what is done, resume what was interrupted."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extend.errors import RecipeError
from extend.manifest import MANIFEST_NAME, hash_content, outputs_intact
from extend.model_config import read_json
from extend.options import Options
from extend.output import write_json
from extend.recipe import Recipe, Stage, input_paths, load_recipe, resolve_inputs

logger = logging.getLogger(__name__)
RUN_RECORD = "run.json"


def _rescale(options: Any, out: Path) -> Path:
    from extend.rope import rescale

    return rescale(options.model, out, target_len=options.to, method=options.method,
                   sliding_window=options.sliding_window, overwrite=True, **options.options)


def _train(options: Any, out: Path) -> Path:
    from extend.train import train

    return train(options, out, overwrite=True)


def _extract(options: Any, out: Path) -> Path:
    from extend.adapter import extract

    return extract(**options.model_dump(), out=out, overwrite=True)


def _merge(options: Any, out: Path) -> Path:
    from extend.merge import merge

    return merge(**options.model_dump(), out=out, overwrite=True)


def _eval(options: Any, out: Path) -> Path:
    from extend.evaluate import evaluate

    return evaluate(**options.model_dump(), out=out, overwrite=True)


def _report(options: Any, out: Path) -> Path:
    from extend.evaluate import report

    return report(options.results, out, title=options.title, training=options.training,
                  overwrite=True)


RUNNERS: dict[str, Callable[[Any, Path], Path]] = {
    "rescale": _rescale, "train": _train, "extract": _extract, "merge": _merge, "eval": _eval,
    "report": _report}


def run(recipe: Path | str, out: Path | str) -> Path:
    """Run a recipe into `out`, one directory a stage; return `out`.

    A stage is skipped when it was run with the same options on inputs with the same content and
    its output is whole. An interrupted stage starts again, from its last checkpoint where it
    keeps one.

    Raises:
        RecipeError: the recipe is not valid.
        ExtendError: whatever a stage raises.
    """
    loaded = load_recipe(recipe)
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(loaded.stages, start=1):
        label = f"[{number}/{len(loaded.stages)}] {stage.name} ({stage.kind})"
        _run_stage(stage, loaded, out, label)
    return out


def _run_stage(stage: Stage, recipe: Recipe, out: Path, label: str) -> None:
    names = {s.name for s in recipe.stages}
    options = resolve_inputs(stage.options, lambda value: str(
        out / value if value in names else (recipe.path.parent / value).resolve()))
    fingerprint = _fingerprint(stage, options, out)
    directory = out / stage.name
    record = read_json(out / RUN_RECORD) if (out / RUN_RECORD).exists() else {}
    known = record.get(stage.name)
    if known == fingerprint and (directory / MANIFEST_NAME).is_file():
        problem = outputs_intact(directory)
        if problem is None:
            logger.info("%s: done already, skipped", label)
            return
        logger.info("%s: again, because %s", label, problem)
    elif known not in (None, fingerprint):
        logger.info("%s: again, because its options or inputs have changed", label)
    else:
        logger.info("%s", label)
    if known != fingerprint:
        # Order matters: the old output must be gone before its new fingerprint is recorded.
        for stale in (directory, out / f"{stage.name}.state"):
            shutil.rmtree(stale, ignore_errors=True)
        write_json(out / RUN_RECORD, {**record, stage.name: fingerprint})
    RUNNERS[stage.kind](options, directory)


def _fingerprint(stage: Stage, options: Options, out: Path) -> str:
    """Hash of the stage's options, with each input path replaced by its content's hash."""
    hashes = {}
    for location, value in input_paths(options):
        if not Path(value).exists():
            raise RecipeError(f"{stage.name}: {'.'.join(map(str, location))}: {value} does not "
                              "exist")
        hashes[value] = hash_content(value)
    data = resolve_inputs(options, lambda value: hashes[value]).model_dump(mode="json")
    text = json.dumps({"stage": stage.kind, "options": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
