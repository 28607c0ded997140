"""`cut` and `adapter-report` from the command line, from Python's top and from recipes."""

import json

import pytest
from click.testing import CliRunner

import extend
from extend.adapter import extract
from extend.adapter_format.peft_files import Adapter
from extend.cli import main
from extend.errors import RecipeError
from extend.recipe import load_recipe
from extend.run import run


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return extract(llama.base, llama.tuned, tmp_path_factory.mktemp("adapter") / "a", rank=6)


def invoke(*args) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def ranks(directory) -> set[int]:
    return {module.rank for module in Adapter(directory).modules.values()}


def test_cut_by_command_and_by_function(adapter, tmp_path):
    out = tmp_path / "by-rank"
    assert invoke("cut", "--adapter", adapter, "--rank", 2, "--out", out) == f"{out}\n"
    assert ranks(out) == {2}
    told = json.loads(invoke("cut", "--adapter", adapter, "--bytes", 30000, "--dtype", "bfloat16",
                             "--out", tmp_path / "by-bytes", "--json"))
    assert told == {"output": str(tmp_path / "by-bytes")}
    assert (tmp_path / "by-bytes" / "adapter_model.safetensors").stat().st_size <= 30000
    assert Adapter(tmp_path / "by-bytes").dtypes == {"BF16"}
    assert ranks(extend.cut(adapter, tmp_path / "function", energy=1e-9)) == {1}


def test_report_by_command_and_by_function(adapter, llama, tmp_path):
    invoke("adapter-report", adapter, "--base", llama.base, "--out", tmp_path / "a")
    extend.adapter_report(adapter, tmp_path / "b", base=llama.base)
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_label_twice_is_refused(adapter, tmp_path):
    result = CliRunner().invoke(main, ["adapter-report", str(adapter), "--results", "a=x",
                                       "--results", "a=y", "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert "adapter-report: write each result once as LABEL=PATH; given a=x a=y" in result.stderr


def test_recipe(llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: unit\nstages:\n"
        f"  - {{name: whole, stage: extract, base: {llama.base}, tuned: {llama.tuned}, rank: 6}}\n"
        "  - {name: small, stage: cut, adapter: whole, rank: 3}\n"
        "  - {name: page, stage: adapter-report, adapter: small, "
        f"base: {llama.base}}}\n")
    out = run(recipe, tmp_path / "out")
    assert ranks(out / "small") == {3}
    assert json.loads((out / "page" / "report.json").read_text())["totals"]["ranks"] == [3, 3]


@pytest.mark.parametrize("options, message", [
    ("", "give one of rank, energy and adapter_bytes"),
    (", rank: 2, energy: 0.5", r"rank \(2\) and energy \(0.5\) exclude each other"),
    (", rank: 0", "rank: Input should be greater than or equal to 1"),
])
def test_recipe_with_no_size_or_two(tmp_path, options, message):
    (tmp_path / "a").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: unit\nstages:\n"
                      f"  - {{name: small, stage: cut, adapter: a{options}}}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)
