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

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from extend.errors import RecipeError
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
    output_names,
)
from extend.registry import suggest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TOP_KEYS = ("name", "seed", "stages")

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a recipe: `kind` is a key of `STAGES`, `options` are checked."""

    name: str
    kind: str
    options: Options


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe; `path` is the file it was read from."""

    path: Path
    name: str
    stages: tuple[Stage, ...]


class _Problems:
    """Collects messages with the line of the YAML node that each is about."""

    def __init__(self, path: Path, root: yaml.Node):
        self.path, self.root, self.messages = path, root, []

    def add(self, location: Location, message: str) -> None:
        self.messages.append((_line_of(self.root, location), message))

    def raise_if_any(self) -> None:
        if self.messages:
            lines = [f"{self.path}:{line}: {message}" for line, message in sorted(self.messages)]
            raise RecipeError("\n".join(lines))


def load_recipe(path: Path | str, *, check_files: bool = True) -> Recipe:
    """Read and check a recipe.

    Args:
        check_files: whether input paths must exist already.

    Raises:
        RecipeError: everything that is wrong with it, one problem a line.
    """
    path = Path(path)
    root, data = _parse(path)
    problems = _Problems(path, root)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping with the keys {', '.join(_TOP_KEYS)}")
    for key in data:
        if key not in _TOP_KEYS:
            problems.add((key,), f"unknown key {key!r};{suggest(str(key), _TOP_KEYS)} a recipe has "
                                 f"{', '.join(_TOP_KEYS)}")
    entries = data.get("stages")
    if not isinstance(entries, list) or not entries:
        problems.add(("stages",), "stages: a list of at least one stage is needed")
        entries = []
    names = [output_names(entry) for entry in entries]
    read = [_read_stage(entry, index, names, data.get("seed"), problems, check_files)
            for index, entry in enumerate(entries)]
    problems.raise_if_any()
    stages = tuple(one for stage in read for one in _one_by_one(stage))
    return Recipe(path.resolve(), str(data.get("name") or path.stem), stages)


def _one_by_one(stage: Stage) -> list[Stage]:
    """The stage, or one for each target of a merge that has several."""
    labels = label_targets(stage.options.target) if stage.kind == "merge" else None
    if labels is None:
        return [stage]
    return [Stage(f"{stage.name}-{label}", stage.kind,
                  stage.options.model_copy(update={"target": path}))
            for label, path in labels.items()]


def _parse(path: Path) -> tuple[yaml.Node, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise RecipeError(f"{where}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML ({error})") from None
    if root is None:
        raise RecipeError(f"{path}: is empty; a recipe has {', '.join(_TOP_KEYS)}")
    for message, line in _unwanted(text, root):
        raise RecipeError(f"{path}:{line}: {message}")
    return root, data


def _unwanted(text: str, root: yaml.Node) -> Iterator[tuple[str, int]]:
    """What YAML allows and a recipe does not.

    A key given twice: the last would win silently. An alias inside an anchored block: it could
    hold itself, or grow without bound.
    """
    anchored: list[bool] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) and any(anchored):
            yield f"alias *{event.anchor} inside an anchored block", event.start_mark.line + 1
        elif isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()
    yield from _duplicate_keys(root)


def _duplicate_keys(node: yaml.Node) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if str(key.value) in keys:
                yield f"key {key.value!r} is given twice", key.start_mark.line + 1
            keys.add(str(key.value))
            yield from _duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item)


def _line_of(node: yaml.Node, location: Location) -> int:
    """The line of the deepest node that `location` reaches, from 1."""
    line = node.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                continue  # pydantic puts names of union members into locations
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _read_stage(entry: Any, index: int, names: list[list[Any]], seed: Any, problems: _Problems,
                check_files: bool) -> Stage | None:
    where = ("stages", index)
    if not isinstance(entry, dict):
        problems.add(where, "a stage is a mapping with name, stage and its options")
        return None
    name, kind = entry.get("name"), entry.get("stage")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.add((*where, "name"), f"name: {name!r} is not a name of letters, digits, - and _")
    elif taken := set(names[index]).intersection(_earlier(names, index)):
        problems.add((*where, "name"), f"name: {min(taken)!r} is taken by an earlier stage")
    if kind not in STAGES:
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
    for location, value in input_paths(options):
        problem = _check_input(value, index, names, problems.path, check_files)
        if problem:
            problems.add((*where, *location), f"{_dotted(location)}: {problem}")
    return Stage(str(name), kind, options)


def _read_options(kind: str, fields: dict[str, Any], where: Location,
                  problems: _Problems) -> Options | None:
    try:
        return STAGES[kind].model_validate(fields)
    except ValidationError as error:
        _explain(error, STAGES[kind], where, kind, problems)
        return _without_wrong_fields(STAGES[kind], fields, error)


def _without_wrong_fields(model: type[Options], fields: dict[str, Any],
                          error: ValidationError) -> Options | None:
    """The options that are left, so that what is wrong with them is reported too."""
    wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
    try:
        return model.model_validate({k: v for k, v in fields.items() if k not in wrong})
    except ValidationError:
        return None


def _explain(error: ValidationError, model: type[BaseModel], where: Location, kind: str,
             problems: _Problems) -> None:
    for item in error.errors(include_url=False, include_context=False):
        location = tuple(item["loc"])
        field = _dotted(location) or kind
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            message = (f"{field}: unknown key;{suggest(str(location[-1]), known)} "
                       f"{kind} accepts {', '.join(known)}")
        elif item["type"] == "missing":
            message = f"{field}: is missing"
        else:
            message = f"{field}: {item['msg'].removeprefix('Value error, ')}"
            if location and not isinstance(item["input"], dict | list):
                message += f" (it is {item['input']!r})"
        problems.add((*where, *location), message)


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """The field names of the option model that `location` leads to."""
    for part in location:
        candidates = _models_in(model.model_fields[part].annotation) \
            if part in model.model_fields else []
        by_kind = [m for m in candidates if _kind_of(m) in location]
        model = (by_kind or candidates or [model])[0]
    return list(model.model_fields)


def _kind_of(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", [None])[0] if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


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
        yield from _problem(("tasks",), lambda: _check_tasks(options))
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


def _check_tasks(options: EvalOptions) -> None:
    from extend.evaluate import check_tasks

    check_tasks(options.tasks)


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
        return f"{path} does not exist, and no earlier stage is called {value!r};" \
               f"{suggest(value, earlier)}"
    return None
