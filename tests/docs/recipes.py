"""YAML of pages: a whole recipe, or a part of one that a comment before it names.

    <!-- recipe: stages -->      a list of stages
    <!-- recipe: train -->       some keys of a stage of that kind
    <!-- not ours: mergekit -->  a file of another tool
"""

from pathlib import Path
from typing import Any

import yaml

from extend.errors import RecipeError
from extend.recipe import load_recipe

_LEAST: dict[str, dict[str, Any]] = {
    "train": {"model": "m", "schedule": [{"length": 1024, "steps": 1, "lr": 1e-5}],
              "data": [{"kind": "retrieval"}]},
    "rescale": {"model": "m", "to": 1024},
    "eval": {"model": "m", "tasks": ["passkey"], "lengths": [1024]},
}
"""What a stage needs beside the keys of a part."""


def problem(text: str, marker: str, folder: Path) -> str | None:
    """What is wrong with a block of YAML."""
    kind, _, name = marker.partition(":")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"not YAML: {error}"
    if kind == "not ours":
        return None
    if kind == "recipe" and name.strip() == "stages":
        data = {"stages": data}
    elif kind == "recipe":
        least = _LEAST.get(name.strip())
        if least is None:
            return f"no keys are known that a part of {name.strip()!r} needs beside it"
        data = {"stages": [{"name": "part", "stage": name.strip(), **least, **data}]}
    path = folder / "recipe.yaml"
    path.write_text(text if not marker else yaml.safe_dump(data), encoding="utf-8")
    try:
        load_recipe(path, check_files=False)
    except RecipeError as error:
        return str(error)
    return None
