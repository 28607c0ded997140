"""From the tasks a user names to the cells of the grid. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from extend.errors import RecipeError
from extend.evaluate.tasks import GROUPS, TASKS, Cell, Task
from extend.evaluate.tasks.task import BASE
from extend.option_types import parse_length
from extend.registry import check_options, lookup, option_names, suggest

_OWN_KEYS = ("task", "name", "lengths", "depths", "trials")
_GRID_KEYS = ("lengths", "depths", "trials")


@dataclass(frozen=True, slots=True)
class Unit:
    """Cells of a task that are measured in one go."""

    task: Task
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task with its label and its cells."""

    name: str
    spec: Mapping[str, Any]
    task: Task
    cells: tuple[Cell, ...]

    def units(self, done: Collection[str] = ()) -> list[Unit]:
        """What is still to be measured, given the keys of finished cells."""
        joined = getattr(self.task, "joined", False)
        groups = [self.cells] if joined else [(cell,) for cell in self.cells]
        return [Unit(self.task, group) for group in groups
                if any(cell.key not in done for cell in group)]


def order_units(planned: Sequence[PlannedTask], done: Collection[str] = ()) -> list[Unit]:
    """All that is to do, the longest first, so that processes that take turns end together."""
    units = [unit for entry in planned for unit in entry.units(done)]
    return sorted(units, key=lambda unit: -max(cell.length or 0 for cell in unit.cells))


def with_base(planned: Sequence[PlannedTask], native_len: int) -> list[PlannedTask]:
    """The plan, and each task on a grid once more at the native length, for the base model.

    Args:
        native_len: tokens, the base's `max_position_embeddings`.
    """
    extended = []
    for entry in planned:
        if entry.task.on_grid and not getattr(entry.task, "joined", False):
            shortest = min(cell.length for cell in entry.cells)
            extra = [replace(cell, length=native_len, control=BASE) for cell in entry.cells
                     if cell.control is None and cell.length == shortest]
            entry = replace(entry, cells=(*entry.cells, *extra))
        extended.append(entry)
    return extended


def spread_options(names: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tasks as mappings, each with those of the options that it has.

    Args:
        names: in TASKS or GROUPS.
        options: `key`, for every task that has it, or `task.key` -> value.

    Raises:
        RecipeError: an unknown task, or an option that no task has.
    """
    specs = [{"task": name} for given in names for name in GROUPS.get(given, (given,))]
    for key, value in options.items():
        label, _, option = key.rpartition(".")
        takers = [spec for spec in specs if label in ("", spec["task"]) and option in
                  (*option_names(lookup(TASKS, spec["task"], "tasks")), *_GRID_KEYS)]
        if not takers:
            known = sorted({name for spec in specs
                            for name in option_names(lookup(TASKS, spec["task"], "tasks"))})
            raise RecipeError(f"option {key!r}: none of {', '.join(names)} has it;"
                              f"{suggest(option, known)} they have {', '.join(known)}")
        for spec in takers:
            spec[option] = value
    return specs


def check_tasks(tasks: Sequence[str | Mapping[str, Any]]) -> None:
    """Check names, options and labels of tasks, before any file is looked at.

    Raises:
        RecipeError: what is wrong with the first task that is.
    """
    labels: list[str] = []
    if isinstance(tasks, str) or not tasks:
        raise RecipeError(f"tasks: a list of at least one task is needed, it is {tasks!r}")
    for entry in expand(tasks):
        label, spec = _normalize(entry)
        if label in labels:
            raise RecipeError(f"tasks: two are called {label!r}; give one of them another `name`")
        labels.append(label)
        _build(label, spec)


def plan_tasks(tasks: Sequence[str | Mapping[str, Any]], *, lengths: Sequence[int | str],
               depths: int | Sequence[float], trials: int) -> list[PlannedTask]:
    """Lay out the cells of every task.

    Args:
        lengths, depths, trials: of tasks on a grid that bring none of their own.

    Raises:
        RecipeError: a wrong name, option, label or grid.
        DataError: a file that a task reads is missing or malformed.
    """
    check_tasks(tasks)
    planned = []
    for entry in expand(tasks):
        label, spec = _normalize(entry)
        task = _build(label, spec)
        grid: tuple[Any, Any, int] = ((), (), 0)
        if task.on_grid:
            grid = (_lengths(spec.get("lengths", lengths), label),
                    spread_depths(spec.get("depths", depths), label),
                    _positive(spec.get("trials", trials), f"{label}: trials"))
        planned.append(PlannedTask(label, spec, task, tuple(task.cells(label, *grid))))
    return planned


def expand(tasks: Sequence[str | Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    """The same with groups of tasks spelled out; a group's options go to all its tasks."""
    found: list[str | Mapping[str, Any]] = []
    for entry in tasks:
        spec = entry if isinstance(entry, Mapping) else {"task": entry}
        members = GROUPS.get(spec.get("task")) if isinstance(spec.get("task"), str) else None
        found += [entry] if members is None else [{**spec, "task": name} for name in members]
    return found


def _normalize(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    spec = {"task": entry} if isinstance(entry, str) else entry
    if not isinstance(spec, Mapping) or not isinstance(spec.get("task"), str):
        raise RecipeError(f"tasks: {entry!r} is neither a name nor a mapping with the key `task`; "
                          f"choose one of {', '.join(TASKS)}")
    label = spec.get("name", spec["task"])
    if not isinstance(label, str) or not label.strip():
        raise RecipeError(f"tasks: name {label!r} of {spec['task']} is not a text")
    return label, dict(spec)


def _build(label: str, spec: Mapping[str, Any]) -> Task:
    kind = lookup(TASKS, spec["task"], "tasks")
    options = {k: v for k, v in spec.items() if k not in _OWN_KEYS}
    accepted = (*option_names(kind), *_OWN_KEYS)
    for key in options:
        if key not in accepted:
            raise RecipeError(f"task {label}: unknown option {key!r};{suggest(key, accepted)} it "
                              f"accepts {', '.join(accepted)}")
    if not kind.on_grid:
        for key in _GRID_KEYS:
            if key in spec:
                raise RecipeError(f"task {label}: {spec['task']} has no {key}; leave the key out")
    check_options(kind, options, f"task {label}")
    types = get_type_hints(kind)
    return kind(**{key: _typed(value, types[key], f"task {label}: {key}")
                   for key, value in options.items()})


def _typed(value: Any, wanted: Any, field: str) -> Any:
    """An option as its annotation wants it; every option is a number, a text or a switch."""
    accepted = get_args(wanted) or (wanted,)
    if value is None and type(None) in accepted:
        return None
    if int in accepted:
        return _length(value, field)
    if str in accepted and isinstance(value, str | Path) and str(value).strip():
        return str(value)
    if bool in accepted and isinstance(value, bool):
        return value
    kind = "true or false" if bool in accepted else "text"
    raise RecipeError(f"{field}: {value!r} is not {kind}")


def _lengths(lengths: Sequence[int | str], label: str) -> list[int]:
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or not lengths:
        raise RecipeError(f"{label}: lengths: a list of lengths in tokens is needed, it is "
                          f"{lengths!r}")
    return sorted({_length(length, f"{label}: lengths") for length in lengths})


def _length(value: Any, field: str) -> int:
    try:
        return parse_length(value)
    except ValueError as error:
        raise RecipeError(f"{field}: {error}") from None


def spread_depths(depths: int | Sequence[float], label: str) -> list[float]:
    """A number of depths, spread equally from 0 to 1, or the depths themselves.

    Raises:
        RecipeError: not a number of at least 1, or a depth outside [0, 1].
    """
    if isinstance(depths, Sequence) and not isinstance(depths, str):
        for depth in depths:
            if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
                raise RecipeError(f"{label}: depths: {depth!r} is not between 0 and 1")
        if not depths:
            raise RecipeError(f"{label}: depths: the list is empty")
        return sorted({round(float(depth), 6) for depth in depths})
    count = _positive(depths, f"{label}: depths")
    return [0.5] if count == 1 else [round(i / (count - 1), 6) for i in range(count)]


def _positive(value: Any, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{field}: {value!r} is not a number of at least 1")
    return value
