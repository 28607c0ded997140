"""The text of a recipe: YAML, the line of everything in it, and values changed with `--set`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from extend.errors import RecipeError
from extend.registry import suggest
from extend.untrusted import (
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    load_yaml,
    read_bounded,
    yaml_problems,
)

Location = tuple[str | int, ...]
_MISREAD = ("float", "int", "timestamp")


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 but for its traps.

    `2.8e9` and `1e-5` are numbers (not text), `010` is ten (not eight), `1:30` and dates are text
    (not 90, not an object). `1_000` is a number as before.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers
                if tag.rpartition(":")[2] not in _MISREAD]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16 if "x" in text else 10)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"(?:[-+]?\d[\d_]*|0x[\da-fA-F_]+)\Z"),
    list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?"
               r"|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
    list("-+0123456789."))
RecipeLoader.add_constructor("tag:yaml.org,2002:int", _read_int)


class RecipeText:
    """A recipe's YAML as data, with the place where each value was written.

    Attributes:
        path: of the file.
        data: what the YAML holds, with `--set` applied; not checked in any other way.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()):
        """Read the file.

        Args:
            overrides: `KEY=VALUE`, see `set_values`.

        Raises:
            RecipeError: it cannot be read, or is not YAML.
        """
        self.path = path
        text = _read(path)
        self._root, self.data = _parse(path, text)
        self._unwanted = list(_duplicate_keys(self._root, set()))
        self.data, self._set, self._refused = set_values(self.data, overrides)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(where, message) of what YAML allows and a recipe does not, and of `--set`."""
        yield from ((f"{self.path}:{line}", message) for message, line in self._unwanted)
        yield from ((f"--set {given}", message) for given, message in self._refused)

    def where(self, location: Location) -> str:
        """`recipe.yaml:8` of the deepest value that `location` reaches, or `--set KEY=VALUE`."""
        for length in range(len(location), 0, -1):
            if location[:length] in self._set:
                return f"--set {self._set[location[:length]]}"
        return f"{self.path}:{_line_of(self._root, location)}"


def written_values(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, value) of every value that a recipe's text holds, the last one first.

    What an alias repeats stands in the text once, and is given once.
    """
    root = yaml.compose(text, Loader=RecipeLoader)
    places = {node.start_mark.index: (node.end_mark.index, node.value) for node in _scalars(root)}
    return [(begin, *places[begin]) for begin in sorted(places, reverse=True)]


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.CollectionNode):
        for item in node.value:
            yield from _scalars(item[1] if isinstance(item, tuple) else item)


def dotted(location: Location) -> str:
    """`schedule.0.lr`."""
    return ".".join(str(part) for part in location)


def _read(path: Path) -> str:
    try:
        return read_bounded(path, MAX_YAML_BYTES)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None


def _parse(path: Path, text: str) -> tuple[yaml.Node, Any]:
    try:
        refused = list(yaml_problems(text, RecipeLoader))
        if refused:  # before anything is built of it
            raise RecipeError("\n".join(f"{path}:{line}: {what}" for what, line in refused[:8]))
        root, data = yaml.compose(text, Loader=RecipeLoader), load_yaml(text, RecipeLoader)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise RecipeError(f"{where}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if root is None:
        raise RecipeError(f"{path}: is empty; a recipe has name, seed, stages")
    return root, data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _duplicate_keys(node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Keys that are given twice, of which the last would win silently."""
    if id(node) in seen:  # an alias: told where the block is written
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if str(key.value) in keys:
                yield f"key {key.value!r} is given twice", key.start_mark.line + 1
            keys.add(str(key.value))
            yield from _duplicate_keys(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item, seen)


def _line_of(node: yaml.Node, location: Location) -> int:
    """The line of the deepest node that `location` reaches, from 1."""
    line = node.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in _pairs(node) if k.value == str(part)), None)
            if found is None:
                continue  # pydantic puts names of union members into locations
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) \
                and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Its keys and values, and then those that `<<` merges into it."""
    yield from node.value
    for key, value in node.value:
        if key.value == "<<":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    yield from _pairs(merged)


def set_values(data: Any, overrides: Sequence[str],
               ) -> tuple[Any, dict[Location, str], list[tuple[str, str]]]:
    """Change values of a recipe.

    A key is a path of keys, places in lists (from 0 on) and names of a list's members, with dots
    between: `stages.long.schedule.0.lr`. `stages.` may be left out before the name of a stage.
    Values are YAML: `1e-5`, `[8k, 16k]`, `null`. Mappings on the way are made where they are
    missing. What YAML aliases share is changed in the one place that is named.

    Args:
        overrides: `KEY=VALUE`, in order; a later one wins.

    Returns:
        The data, not sharing what was changed; location -> the text of what was set there; and
        (text, message) of what cannot be set.
    """
    places: dict[Location, str] = {}
    refused = []
    for text in overrides:
        try:
            data, location = _set_value(data, text)
        except RecipeError as error:
            refused.append((text, str(error)))
        else:
            places[location] = text
    return data, places, refused


def _set_value(data: Any, text: str) -> tuple[Any, Location]:
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts) or len(parts) > MAX_YAML_DEPTH:
        raise RecipeError("write KEY=VALUE, such as seed=1 or long.schedule.0.lr=1e-5")
    try:
        refused = list(yaml_problems(value, RecipeLoader))
        root = None if refused else yaml.compose(value, Loader=RecipeLoader)
        refused += [] if root is None else _duplicate_keys(root, set())
        read = None if refused else load_yaml(value, RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or _one_line(error)
        raise RecipeError(f"the value is not valid YAML ({problem})") from None
    if refused:
        raise RecipeError(refused[0][0])
    if isinstance(data, dict) and parts[0] not in data and _has_stage(data, parts[0]):
        parts = ["stages", *parts]
    return _replaced(data, parts, read, ())


def _has_stage(data: dict[str, Any], name: str) -> bool:
    return name in _names(data.get("stages"))


def _names(items: Any) -> list[str]:
    return [item["name"] for item in items if isinstance(item, dict)
            and isinstance(item.get("name"), str)] if isinstance(items, list) else []


def _replaced(data: Any, parts: Sequence[str], value: Any,
              before: Location) -> tuple[Any, Location]:
    """A copy of `data`, as deep as `parts` lead, that holds `value` there; and where that is."""
    if not parts:
        return value, before
    if isinstance(data, list):
        place: str | int = _place(data, parts[0], before)
        inner = data[place]
    elif isinstance(data, dict) or data is None:
        place, data = parts[0], data or {}
        inner = data.get(place)
    else:
        raise RecipeError(f"{dotted(before) or 'the recipe'} is {data!r}, which has no "
                          f"{parts[0]!r}")
    if not before and parts[0] not in data:
        _refuse_unknown_start(data, parts[0])
    changed, location = _replaced(inner, parts[1:], value, (*before, place))
    copy = data.copy()
    copy[place] = changed
    return copy, location


def _refuse_unknown_start(data: Any, name: str) -> None:
    known = ["name", "seed", "stages", *_names(data.get("stages") if isinstance(data, dict)
                                               else None)]
    if name not in known:
        raise RecipeError(f"{name!r} is neither a stage nor a key of the recipe;"
                          f"{suggest(name, known)} it has {', '.join(known)}")


def _place(items: list[Any], part: str, before: Location) -> int:
    if part.isdecimal():
        if int(part) < len(items):
            return int(part)
        raise RecipeError(f"{dotted(before)} has no place {part}; there are {len(items)}, from 0 "
                          "on")
    names = _names(items)
    if names.count(part) == 1:
        return next(i for i, item in enumerate(items)
                    if isinstance(item, dict) and item.get("name") == part)
    if part in names:
        raise RecipeError(f"{names.count(part)} members of {dotted(before)} are called {part!r}; "
                          "write the place of one, from 0 on")
    raise RecipeError(f"{dotted(before)} is a list and {part!r} no place in it;"
                      f"{suggest(part, names)} write a number from 0 to {len(items) - 1}"
                      + (f", or one of {', '.join(names)}" if names else ""))
