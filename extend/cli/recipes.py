"""Recipes before they run: `init`, `validate`, `schema`."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from extend.cli.group import main, reporting, set_option
from extend.cli.types import OpenName

logger = logging.getLogger(__name__)


def _names() -> Iterable[str]:
    from extend.shipped_recipes import shipped_recipes

    return shipped_recipes()


@main.command()
@click.argument("name", required=False, type=OpenName(_names))
@click.option("--list", "list_", is_flag=True, help="List the recipes that there are.")
@click.option("--out", default=None, metavar="FILE", type=click.Path(),
              help="File to write; NAME.yaml unless given.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@reporting
def init(name, list_, out, overwrite):
    """Copy the shipped recipe NAME, to be edited and run.

    Says which of its inputs are still to be provided. Without a NAME, lists the recipes.

    \b
    extend init --list
    extend init smollm2-135m-128k --out my.yaml
    """
    if list_ or name is None:
        if out is not None:
            raise click.UsageError("--out needs the NAME of a recipe; `extend init --list` shows "
                                   "them")
        return _listing()
    from extend.recipe import check_recipe
    from extend.shipped_recipes import copy_recipe

    path = copy_recipe(name, out or f"{name}.yaml", overwrite=overwrite)
    missing = list(dict.fromkeys(p.missing for p in check_recipe(path)[1] if p.missing))
    if missing:
        logger.warning("inputs to be provided, or named otherwise: %s", ", ".join(missing))
    return {"output": str(path), "recipe": name, "missing_inputs": missing}


def _listing() -> tuple[dict[str, Any], str]:
    from extend.shipped_recipes import shipped_recipes, summary_of

    found = {name: summary_of(path) for name, path in shipped_recipes().items()}
    width = max(map(len, found))
    return ({"recipes": [{"name": name, "summary": text} for name, text in found.items()]},
            "\n".join(f"{name:<{width}}  {text}" for name, text in found.items()))


@main.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...",
                type=click.Path(path_type=Path))
@set_option
@click.option("--inputs", is_flag=True, help="Inputs that do not exist are errors, not warnings.")
@reporting
def validate(recipes, overrides, inputs):
    """Say everything that is wrong with recipes, with file and line; nothing is run or downloaded.

    Exits with 1 where there is an error.

    \b
    extend validate my.yaml
    extend validate recipes/*.yaml --inputs
    extend validate my.yaml --set long.schedule.0.lr=1e-5 --json
    """
    found = [_validate(path, overrides, inputs) for path in recipes]
    wrong = sum(not one["valid"] for one in found)
    complaint = f"{wrong} of {len(found)} recipes cannot run" if wrong else None
    results = {"valid": not wrong, "recipes": found}
    return results, "\n".join(line for one in found for line in _told(one)), complaint


def _validate(path: Path, overrides: tuple[str, ...], inputs: bool) -> dict[str, Any]:
    from extend.errors import RecipeError
    from extend.recipe import check_recipe

    try:
        problems = [{"severity": "warning" if problem.missing and not inputs else "error",
                     "where": problem.where, "message": problem.message}
                    for problem in check_recipe(path, overrides)[1]]
    except RecipeError as error:  # not even YAML: `recipe.yaml:8: message`
        place = re.match(r"(?::\d+)?", str(error).removeprefix(str(path)))[0]
        where = f"{path}{place}"
        problems = [{"severity": "error", "where": where,
                     "message": str(error).removeprefix(f"{where}: ")}]
    return {"recipe": str(path), "problems": problems,
            "valid": all(problem["severity"] != "error" for problem in problems)}


def _told(one: dict[str, Any]) -> list[str]:
    lines = [f"{p['where']}: {p['severity']}: {p['message']}" for p in one["problems"]]
    return [*lines, f"{one['recipe']}: valid"] if one["valid"] else lines


@main.command()
@reporting
def schema():
    """Print the JSON Schema of recipes, by which editors check and complete them.

    The first line of a recipe names the file that holds it, which `extend init` takes care of.

    \b
    extend schema > recipe.schema.json
    """
    from extend.recipe_schema import recipe_schema

    found = recipe_schema()
    return found, json.dumps(found, indent=2)
