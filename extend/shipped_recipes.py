"""The recipes and the schema that come with the package.

They lie in `recipes/` of the source tree, which `extend/recipes` links to, so that they are package
data: an installed package has them in the same place.
"""

import json
import os
import re
from importlib.resources import files
from pathlib import Path

from extend.console import printable
from extend.errors import CheckpointError, RecipeError
from extend.output import write_text
from extend.recipe_text import written_values
from extend.registry import lookup

SCHEMA_NAME = "recipe.schema.json"
EDITOR_LINE = "# yaml-language-server: $schema="
"""The first line of a recipe, with the path of the schema: editors check and complete by it."""
_PLAIN = re.compile(r"[\w./+-]+")  # what YAML reads as text without quotes


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that is shipped, sorted by name."""
    directory = Path(str(files("extend") / "recipes"))
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def schema_file() -> Path:
    """The JSON Schema that the recipes' first line points to."""
    return Path(str(files("extend") / "recipes")) / SCHEMA_NAME


def summary_of(recipe: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    said = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if line.startswith(EDITOR_LINE):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        said.append(line.removeprefix("# "))
    return re.split(r"(?<=[.:])\s", " ".join(said) + " ")[0].rstrip(".:")


def copy_recipe(name: str, out: Path | str, *, overwrite: bool = False) -> Path:
    """Copy a shipped recipe, ready to be edited; return where it is.

    Its first line then leads editors to the schema of this installation, and the commands in its
    comment name the copy. Copied from a source tree, its inputs (`../data/...`) are still those
    of the tree.

    Args:
        out: a file.

    Raises:
        RecipeError: no such recipe.
        CheckpointError: `out` exists and `overwrite` is false, or it cannot be written.
    """
    source, out = lookup(shipped_recipes(), name, "recipe"), Path(out)
    text = source.read_text(encoding="utf-8")
    text = text.replace(f"{EDITOR_LINE}{SCHEMA_NAME}", f"{EDITOR_LINE}{schema_file()}", 1)
    text = _keeping_inputs(text, source.resolve(), out)
    text = text.replace(f"recipes/{source.name}", printable(str(out)))
    if out.is_dir():
        raise RecipeError(f"{out}: is a directory; give the name of a file, such as "
                          f"{out / source.name}")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists already; give another --out, or --overwrite to "
                              "replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from None
    return out


def _keeping_inputs(text: str, source: Path, out: Path) -> str:
    """The recipe's text with paths into the source tree that `source` lies in as `out` needs them:
    relative to it within the tree, else absolute. An installed package has no such tree."""
    tree, home = source.parents[1], Path(os.path.abspath(out)).parent
    if not (tree / "pyproject.toml").is_file():
        return text
    for begin, end, value in written_values(text):
        if value.startswith("../"):
            path = os.path.normpath(source.parent / value)
            path = os.path.relpath(path, home) if home.is_relative_to(tree) else path
            written = path if _PLAIN.fullmatch(path) else json.dumps(path)
            text = text[:begin] + written + text[end:]
    return text
