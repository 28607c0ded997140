"""`init`, `validate` and `schema`, and that the shipped recipes fit their schema."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from extend.cli import main
from extend.options import STAGES, resolve_inputs
from extend.recipe import load_recipe
from extend.recipe_schema import recipe_schema
from extend.recipe_text import RecipeLoader
from extend.shipped_recipes import EDITOR_LINE, SCHEMA_NAME, schema_file, shipped_recipes

ROOT = Path(__file__).parents[1]
BAD = """\
name: bad
sede: 1
stages:
  - name: long
    stage: train
    model: base
    rank: 4
    schedule:
      - {length: 1kk, steps: 2, lr: fast}
    data: [{kind: retreival}]
  - {name: long, stage: merge, adapter: gone, target: base, dtype: float8}
"""


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def schema():
    return recipe_schema()


def test_the_recipes_of_the_tree_are_those_of_the_package():
    assert {path.resolve() for path in shipped_recipes().values()} == {
        path.resolve() for path in (ROOT / "recipes").glob("*.yaml")}
    assert "demo" in shipped_recipes()


def test_the_shipped_schema_is_current(schema):
    """`scripts/update_schema.py` makes it so."""
    assert json.loads(schema_file().read_text()) == json.loads(json.dumps(schema))


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda p: p.stem)
def test_the_first_line_of_a_recipe_leads_editors_to_the_schema(path):
    assert path.read_text().splitlines()[0] == f"{EDITOR_LINE}{SCHEMA_NAME}"


def test_the_schema_holds_every_option_of_every_stage(schema):
    for kind, model in STAGES.items():
        stage = schema["$defs"][kind]
        assert set(stage["properties"]) == {"name", "stage", *model.model_fields}
        assert stage["additionalProperties"] is False
        assert set(stage["required"]) == {
            name for name, field in model.model_fields.items() if field.is_required()}
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert set(STAGES) < references == set(schema["$defs"])


def test_the_schema_knows_how_values_are_written(schema):
    train, rescale = schema["$defs"]["train"]["properties"], schema["$defs"]["rescale"]
    length = rescale["properties"]["to"]["anyOf"]
    pattern = next(one["pattern"] for one in length if one["type"] == "string")
    assert [bool(re.search(pattern, text)) for text in ("128k", "1.5m", "1_000", "1kb", "x")] == [
        True, True, True, False, False]
    assert {"const": "auto", "type": "string"} in train["rope"]["anyOf"]
    assert "ntk-by-parts" in rescale["properties"]["method"]["enum"]
    assert "passkey" in schema["$defs"]["eval"]["properties"]["tasks"]["items"]["anyOf"][0]["enum"]
    assert "title" in schema["$defs"]["report"]["properties"]


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda p: p.stem)
def test_every_key_of_a_recipe_is_in_the_schema(path, schema):
    data = yaml.load(path.read_text(), Loader=RecipeLoader)
    assert set(data) <= set(schema["properties"])
    for stage in data["stages"]:
        assert set(stage) <= set(schema["$defs"][stage["stage"]]["properties"])


def test_init_copies_a_recipe_that_loads(tmp_path):
    out = tmp_path / "new" / "mine.yaml"
    result = invoke("init", "demo", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == {"output": str(out), "recipe": "demo", "missing_inputs": []}
    first, *lines = out.read_text().splitlines()
    assert first == f"{EDITOR_LINE}{schema_file()}" and schema_file().is_file()
    assert f"#   extend run {out} --out runs/demo" in lines
    shipped = shipped_recipes()["demo"]
    assert located(load_recipe(out)) == located(load_recipe(shipped))
    again = invoke("init", "demo", "--out", out)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert invoke("init", "demo", "--out", out, "--overwrite").stdout == f"{out}\n"
    assert list(out.parent.iterdir()) == [out]


def located(recipe):
    """The stages of a recipe with their inputs as absolute paths, and what its stages make."""
    made = {stage.name for stage in recipe.stages}
    return [(stage.name, resolve_inputs(stage.options, lambda value: value if value in made else
                                        os.path.normpath(recipe.path.parent / value)))
            for stage in recipe.stages]


@pytest.mark.parametrize(("place", "root"), [("mine.yaml", ""), ("a/mine.yaml", "../"),
                                             ("../mine.yaml", None)])
def test_init_keeps_the_inputs_of_a_source_tree(place, root, tmp_path, monkeypatch):
    """Of those that are still to be made, too: the scripts of the tree make them there."""
    tree = tmp_path / "with space"
    shutil.copytree(shipped_recipes()["demo"].parent, tree / "recipes")
    (tree / "pyproject.toml").touch()
    monkeypatch.setattr("extend.shipped_recipes.shipped_recipes",
                        lambda: {"demo": tree / "recipes/demo.yaml"})
    told = json.loads(invoke("init", "demo", "--out", tree / place, "--json").stdout)
    where = f"{tree}/" if root is None else root
    assert told["missing_inputs"] == [f"{where}assets/demo/{name}" for name in (
        "base", "skill.jsonl", "notes.jsonl", "sibling")]


def test_init_of_an_installed_package_says_what_is_missing(tmp_path, monkeypatch):
    shutil.copytree(shipped_recipes()["demo"].parent, tmp_path / "extend/recipes")
    monkeypatch.setattr("extend.shipped_recipes.shipped_recipes",
                        lambda: {"demo": tmp_path / "extend/recipes/demo.yaml"})
    result = invoke("init", "demo", "--out", tmp_path / "mine/mine.yaml")
    assert "inputs to be provided, or named otherwise: ../assets/demo/base" in result.stderr


def test_init_writes_to_any_path(tmp_path):
    out = tmp_path / os.fsdecode(b"\xff\x1b.yaml")
    assert invoke("init", "demo", "--out", out).stdout_bytes == os.fsencode(out) + b"\n"
    assert f"extend run {tmp_path}/\\udcff\\x1b.yaml --out" in out.read_text()


def test_init_lists_and_suggests(tmp_path):
    listed = json.loads(invoke("init", "--list", "--json").stdout)["recipes"]
    assert [one["name"] for one in listed] == list(shipped_recipes())
    assert all(len(one["summary"]) > 20 and one["summary"][-1] != "." for one in listed)
    assert invoke("init").stdout == invoke("init", "--list").stdout
    wrong = invoke("init", "dmeo", "--out", tmp_path / "x.yaml")
    assert wrong.exit_code == 1 and "did you mean 'demo'?" in wrong.stderr
    assert "give the name of a file" in invoke("init", "demo", "--out", tmp_path).stderr
    assert invoke("init", "--out", tmp_path / "x.yaml").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_validate_reports_everything_in_every_file(tmp_path):
    for name, text in (("bad", BAD), ("broken", "a: [1"), ("good", (
            "stages: [{name: a, stage: rescale, model: gone, to: 1k}]"))):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "base").mkdir()
    files = [tmp_path / f"{name}.yaml" for name in ("bad", "broken", "good", "none")]
    result = invoke("validate", *files)
    assert result.exit_code == 1
    assert result.stderr == "extend: 3 of 4 recipes cannot run\n"
    lines = result.stdout.replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(":")[:2] for line in lines if line.startswith("bad")] == [
        ["bad.yaml", number] for number in ("2", "7", "9", "9", "10", "11", "11", "11")]
    for message in ("did you mean 'seed'?", "rank: unknown key", "'1kk' is not a length",
                    "did you mean 'retrieval'?", "taken by an earlier stage",
                    "gone does not exist", "did you mean 'float32'?"):
        assert sum(message in line for line in lines if line.startswith("bad")) == 1, message
    assert lines[-4:] == [
        "broken.yaml:1: error: not valid YAML (expected ',' or ']', but got '<stream end>')",
        "good.yaml:1: warning: model: gone does not exist, and no earlier stage is called 'gone'",
        "good.yaml: valid", "none.yaml: error: no such recipe"]


def test_validate_as_json_and_with_inputs(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("stages: [{name: a, stage: rescale, model: gone, to: 1k}]")
    result = invoke("validate", path, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    told = json.loads(result.stdout)
    assert told["valid"] is True
    assert [p["severity"] for p in told["recipes"][0]["problems"]] == ["warning"]
    strict = invoke("--json", "validate", path, "--inputs", "--set", "a.too=1")
    assert strict.exit_code == 1
    problems = json.loads(strict.stdout)["recipes"][0]["problems"]
    assert [(p["severity"], p["where"]) for p in problems] == [
        ("error", "--set a.too=1"), ("error", f"{path}:1")]


def test_plan_and_dry_run_take_what_is_set(tmp_path):
    recipe = shipped_recipes()["demo"]
    tokens = [json.loads(invoke("plan", recipe, "--gpus", "8", "--json", *more).stdout)["stages"][4]
              for more in ((), ("--set", "long.schedule.0.steps=600"))]
    assert tokens[0]["name"] == "long"
    assert tokens[1]["seconds"] > 5 * tokens[0]["seconds"]
    for command in (["plan", recipe], ["run", recipe, "--dry-run", "--out", tmp_path / "o"]):
        wrong = invoke(*command, "--set", "lnog.schedule=1")
        assert wrong.exit_code == 1 and "did you mean 'long'?" in wrong.stderr
    assert invoke("plan", "m", "--to", "8k", "--set", "a=1").exit_code == 2
    assert not (tmp_path / "o").exists()


def test_schema_prints_itself(schema):
    expected = json.loads(json.dumps(schema))
    assert json.loads(invoke("schema").stdout) == expected
    assert json.loads(invoke("schema", "--json").stdout) == expected
