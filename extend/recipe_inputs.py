"""The inputs of a recipe that none of its stages makes: paths, and repositories of the Hub."""

from dataclasses import replace

from extend.errors import CheckpointError, HubError, RecipeError
from extend.inputs import HubInput, Pinned, as_hub_input, pin
from extend.options import model_inputs, resolve_inputs
from extend.recipe import Recipe


def input_path(recipe: Recipe, value: str) -> str:
    """An input that no stage makes: an absolute path, or what it is called on the Hub."""
    folder = recipe.path.parent
    return value if as_hub_input(value, folder) else str((folder / value).resolve())


def is_pinned(value: str) -> bool:
    """Whether an input is a commit of a repository, which never changes."""
    wanted = HubInput.parse(value)
    return wanted is not None and wanted.id.pinned


def pin_inputs(recipe: Recipe, *, fetch: bool = True) -> Recipe:
    """The recipe with every model of the Hub as `ORG/NAME@COMMIT`.

    Args:
        fetch: bring them into the Hub's cache too, so that no stage has to wait or fail for them.

    Raises:
        RecipeError: everything that is wrong with them, one problem a line.
        HubError, SpaceError: what kept them from being fetched.
    """
    pins: dict[str, Pinned] = {}
    problems, places = [], _places(recipe)
    whole = {value for place, value in places if not place.endswith(".tokenizer")}
    for place, value in places:
        wanted = as_hub_input(value, recipe.path.parent)
        if wanted is None or value in pins:
            continue
        try:
            pins[value] = pin(wanted, weights=value in whole)
        except (HubError, CheckpointError) as error:
            problems.append(f"{recipe.path}: {place}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    for pinned in pins.values() if fetch else ():
        pinned.fetch()
    return replace(recipe, stages=tuple(
        replace(stage, options=resolve_inputs(
            stage.options, lambda value: str(pins.get(value, value)), model_inputs))
        for stage in recipe.stages)) if pins else recipe


def _places(recipe: Recipe) -> list[tuple[str, str]]:
    """Where each model is named, and how."""
    return [(".".join(map(str, (stage.name, *location))), value)
            for stage in recipe.stages for location, value in model_inputs(stage.options)]
