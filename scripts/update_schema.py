#!/usr/bin/env python
"""Write recipes/recipe.schema.json anew, and lead editors to it in the first line of each recipe.

    .venv/bin/python scripts/update_schema.py

To be run after a change of options, methods or tasks; tests/test_cli_recipes.py says when.
"""

import json
from pathlib import Path

from extend.recipe_schema import recipe_schema
from extend.shipped_recipes import EDITOR_LINE, SCHEMA_NAME

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    schema = json.dumps(recipe_schema(), indent=2) + "\n"
    (RECIPES / SCHEMA_NAME).write_text(schema, encoding="utf-8")
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if not text.startswith(EDITOR_LINE):
            path.write_text(f"{EDITOR_LINE}{SCHEMA_NAME}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
