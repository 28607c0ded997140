"""Every shipped recipe loads, and the demo's inputs are shipped too."""

from pathlib import Path

import pytest

from extend.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads(path: Path):
    recipe = load_recipe(path, check_files=path.stem == "demo")
    assert recipe.name == path.stem
    assert f"extend run recipes/{path.name} --out runs/{path.stem}" in path.read_text()
