"""Read a recipe: one YAML file that lists stages in order.

    name: demo
    seed: 0
    stages:
      - name: rescaled          # also the name of its directory, and how later stages refer to it
        stage: rescale
        model: ../assets/base   # a path, relative to this file
        to: 1k
      - name: long
        stage: train
        model: rescaled         # the output of an earlier stage
        ...

Every problem of a recipe is found before anything runs, and all are reported together, each with
its file and line.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from extend.errors import RecipeError
from extend.inputs.names import HubInput
from extend.option_types import Options
from extend.options import (
    STAGES,
    EvalOptions,
    MergeOptions,
    RescaleOptions,
    RopeOptions,
    TrainOptions,
    input_paths,
    label_targets,
    model_inputs,
    output_names,
)
from extend.recipe_errors import explain
from extend.recipe_text import Location, RecipeText, dotted
from extend.registry import suggest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TOP_KEYS = ("name", "seed", "stages")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a recipe: `kind` is a key of `STAGES`, `options` are checked."""

    name: str
    kind: str
    options: Options


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe; `path` is the file it was read from, `overrides` what was changed in it."""

    path: Path
    name: str
    stages: tuple[Stage, ...]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a recipe.

    Attributes:
        where: `recipe.yaml:8`, or the `--set` that it comes from.
        message: what is wrong, and what to do.
        missing: the input that does not exist (yet), if that is all that is wrong.
    """

    where: str
    message: str
    missing: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class _Problems:
    """Collects problems, each with the place of the value that it is about, and each once."""

    def __init__(self, text: RecipeText):
        self.text = text
        self.found = {Problem(where, message): None for where, message in text.problems()}

    def add(self, location: Location, message: str, *, missing: str | None = None) -> None:
        self.found[Problem(self.text.where(location), message, missing)] = None

    def sorted(self) -> list[Problem]:
        """As they stand in the file; those of `--set` first."""
        def place(problem: Problem) -> tuple[int, str]:
            line = problem.where.rpartition(":")[2]
            return (int(line) if line.isdecimal() else 0, problem.message)

        return sorted(self.found, key=place)


def load_recipe(path: Path | str, *, check_files: bool = True,
                overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        check_files: whether input paths must exist already.
        overrides: `KEY=VALUE`, changes to make to it; see `extend.recipe_text.set_values`.

    Raises:
        RecipeError: everything that is wrong with it, one problem a line.
    """
    recipe, problems = check_recipe(path, overrides)
    wrong = [str(problem) for problem in problems if check_files or not problem.missing]
    if wrong:
        raise RecipeError("\n".join(wrong))
    return recipe


def check_recipe(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Problem]]:
    """Read a recipe and find everything that is wrong with it.

    Returns:
        The recipe, of use only if nothing but inputs is missing, and the problems in their order.

    Raises:
        RecipeError: it cannot be read, or is not YAML.
    """
    text = RecipeText(Path(path), overrides)
    problems, data = _Problems(text), text.data
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping with the keys {', '.join(_TOP_KEYS)}")
    for key in data:
        if key not in _TOP_KEYS:
            problems.add((key,), f"unknown key {key!r};{suggest(str(key), _TOP_KEYS)} a recipe has "
                                 f"{', '.join(_TOP_KEYS)}")
    _check_top(data, problems)
    entries = data.get("stages")
    if not isinstance(entries, list) or not entries:
        problems.add(("stages",), "stages: a list of at least one stage is needed")
        entries = []
    names = [output_names(entry) for entry in entries]
    seed = data.get("seed") if type(data.get("seed")) is int else None  # else it was told above
    read = [_read_stage(entry, index, names, seed, problems)
            for index, entry in enumerate(entries)]
    stages = tuple(one for stage in read if stage is not None for one in _one_by_one(stage))
    recipe = Recipe(text.path.resolve(), str(data.get("name") or text.path.stem), stages,
                    tuple(overrides))
    return recipe, problems.sorted()


def _one_by_one(stage: Stage) -> list[Stage]:
    """The stage, or one for each target of a merge that has several."""
    labels = label_targets(stage.options.target) if stage.kind == "merge" else None
    if labels is None:
        return [stage]
    return [Stage(f"{stage.name}-{label}", stage.kind,
                  stage.options.model_copy(update={"target": path}))
            for label, path in labels.items()]


def _check_top(data: dict[str, Any], problems: _Problems) -> None:
    for key, kind in (("name", str), ("seed", int)):
        value = data.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            told = "text; put it in quotes" if kind is str else "a whole number"
            problems.add((key,), f"{key}: {value!r} is not {told}")


def _read_stage(entry: Any, index: int, names: list[list[Any]], seed: Any,
                problems: _Problems) -> Stage | None:
    where = ("stages", index)
    if not isinstance(entry, dict):
        problems.add(where, "a stage is a mapping with name, stage and its options")
        return None
    name, kind = entry.get("name"), entry.get("stage")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.add((*where, "name"), f"name: {name!r} is not a name of letters, digits, - and _")
    elif taken := set(names[index]).intersection(_earlier(names, index)):
        problems.add((*where, "name"), f"name: {min(taken)!r} is taken by an earlier stage")
    if not isinstance(kind, str) or kind not in STAGES:
        problems.add((*where, "stage"), f"stage: unknown {kind!r};{suggest(str(kind), STAGES)} "
                                        f"choose one of {', '.join(STAGES)}")
        return None
    fields = {k: v for k, v in entry.items() if k not in ("name", "stage")}
    if seed is not None and "seed" in STAGES[kind].model_fields:
        fields.setdefault("seed", seed)
    options = _read_options(kind, fields, where, problems)
    if options is None:
        return None
    for location, problem in check_family(options):
        problems.add((*where, *location), problem)
    on_the_hub = {where for where, value in model_inputs(options) if HubInput.parse(value)}
    for location, value in input_paths(options):
        recipe = problems.text.path
        problem = _check_input(value, index, names, recipe, check_files=False)
        missing = None if problem or location in on_the_hub else _check_input(
            value, index, names, recipe, check_files=True)
        if problem or missing:
            problems.add((*where, *location), f"{dotted(location)}: {problem or missing}",
                         missing=value if missing else None)
    return Stage(str(name), kind, options)


def _read_options(kind: str, fields: dict[str, Any], where: Location,
                  problems: _Problems) -> Options | None:
    try:
        return STAGES[kind].model_validate(fields)
    except ValidationError as error:
        for location, message in explain(error, STAGES[kind], kind):
            problems.add((*where, *location), message)
        return _without_wrong_fields(STAGES[kind], fields, error)


def _without_wrong_fields(model: type[Options], fields: dict[str, Any],
                          error: ValidationError) -> Options | None:
    """The options that are left, so that what is wrong with them is reported too."""
    wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
    try:
        return model.model_validate({k: v for k, v in fields.items() if k not in wrong})
    except ValidationError:
        return None


def check_family(options: Options) -> Iterator[tuple[Location, str]]:
    """Check names and options of RoPE methods and evaluation tasks against their families."""
    ropes: list[tuple[Location, RopeOptions]] = []
    if isinstance(options, RescaleOptions):
        ropes = [(("method",), options)]
    elif isinstance(options, TrainOptions):
        ropes = [(("schedule", i, "rope"), phase.rope)
                 for i, phase in enumerate(options.schedule) if phase.rope is not None]
        if options.rope is not None:
            ropes.append((("rope",), options.rope))
    for location, rope in ropes:
        yield from _problem(location, lambda rope=rope: _check_rope(rope))
    if isinstance(options, EvalOptions):
        yield from _check_tasks(options)
    if isinstance(options, MergeOptions):
        yield from _problem(("method",), lambda: _check_merge(options))


def _problem(location: Location, check: Callable[[], None]) -> Iterator[tuple[Location, str]]:
    try:
        check()
    except RecipeError as error:
        yield location, str(error)


def _check_rope(rope: RopeOptions) -> None:
    from extend.rope.methods import check_method

    check_method(rope.method, rope.options)


def _check_merge(options: MergeOptions) -> None:
    from extend.merge.methods import make_method

    make_method(options.method, options.options)


def _check_tasks(options: EvalOptions) -> Iterator[tuple[Location, str]]:
    """Each by itself and, if nothing is wrong with any, all together."""
    from extend.evaluate import check_tasks

    found = [problem for i, task in enumerate(options.tasks)
             for problem in _problem(("tasks", i), lambda task=task: check_tasks([task]))]
    yield from found or _problem(("tasks",), lambda: check_tasks(options.tasks))


def _earlier(names: list[list[Any]], index: int) -> list[Any]:
    """The names of all stages of the entries before one."""
    return [name for own in names[:index] for name in own if isinstance(name, str)]


def _check_input(value: str, index: int, names: list[list[Any]], recipe: Path,
                 check_files: bool) -> str | None:
    earlier = _earlier(names, index)
    if value in earlier:
        return None
    if value in _earlier(names, len(names)):
        return f"stage {value!r} does not come before this one"
    path = recipe.parent / value
    if check_files and not path.exists():
        told = f"{os.path.normpath(path)} does not exist"
        if not _NAME.fullmatch(value):
            return told
        hint = suggest(value, earlier)
        return f"{told}, and no earlier stage is called {value!r}" + (hint and f";{hint}")
    return None
