"""No stage replaces what it reads, also when it may overwrite its output."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from extend.cli import main
from extend.errors import RecipeError
from extend.output import atomic_directory, require_inputs_outside
from tests.adapter_format.tiny_models import make_models

ROOT = Path(__file__).parents[1] / "extend"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    made = make_models(root, "llama", torch.float32)
    from extend.adapter import extract

    extract(made.base, made.tuned, root / "adapter", rank=4)
    return root


@pytest.fixture
def inputs(models, tmp_path) -> Path:
    return Path(shutil.copytree(models, tmp_path / "models"))


def content(root: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


COMMANDS = {
    "eval": "eval base --tasks passkey --lengths 64 --depths 1 --trials 1 --out base",
    "eval with an adapter": "eval base --adapter adapter --tasks passkey --lengths 64 --depths 1 "
                            "--trials 1 --out adapter",
    "extract, base": "extract --base base --tuned tuned --rank 2 --out base",
    "extract, tuned": "extract --base base --tuned tuned --rank 2 --out tuned",
    "merge, target": "merge --adapter adapter --target target --out target",
    "merge, adapter": "merge --adapter adapter --target target --out adapter",
    "merge, tuned": "merge --tuned tuned --base base --target target --out tuned",
    "merge, all of them": "merge --adapter adapter --target target --out .",
    "rescale": "rescale base --to 512 --out base",
    "plan": "plan base --to 512 --out base"}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_output_that_is_an_input_is_refused(inputs, monkeypatch, command):
    monkeypatch.chdir(inputs)
    before = content(inputs)
    done = CliRunner().invoke(main, [*command.split(), "--overwrite"])
    assert done.exit_code == 1, done.output
    assert "choose an out of its own" in done.stderr
    assert content(inputs) == before


def test_links_do_not_hide_an_input(inputs, tmp_path):
    (tmp_path / "link").symlink_to(inputs / "base")
    for out, path in ((tmp_path / "link", inputs / "base"), (inputs / "base", tmp_path / "link"),
                      (inputs, tmp_path / "link" / "config.json"),
                      (tmp_path, inputs / "base" / "config.json")):
        with pytest.raises(RecipeError, match=r"is or holds the model .*"):
            require_inputs_outside(out, {"model": path})
    require_inputs_outside(inputs / "base" / "out", {"model": inputs / "base"})
    require_inputs_outside(tmp_path / "models2", {"model": inputs})


def test_nothing_is_touched_before_the_check(inputs):
    before = content(inputs)
    with (pytest.raises(RecipeError, match="is or holds the base"),
          atomic_directory(inputs, overwrite=True, inputs={"base": inputs / "base"})):
        raise AssertionError
    assert content(inputs) == before
    assert not list(inputs.parent.glob(".*"))


def test_every_stage_names_its_inputs():
    """Each use of `atomic_directory` says what is read, so that none can replace it."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "atomic_directory":
                assert "inputs" in {keyword.arg for keyword in node.keywords}, path
