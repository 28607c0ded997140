"""Imports point downwards: a stage never imports a sibling, nothing imports upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "extend"
LAYERS = [
    {"errors", "secrets"},
    {"console", "untrusted"},
    {"lock"},
    {"registry", "model_config", "documents", "encoding", "option_types", "output", "page",
     "together", "hub"},
    {"checkpoint", "haystack", "tokenizer", "transfer_options", "adapter_options",
     "publish_options", "data_options", "curves"},
    {"train_options", "recipe_text", "inputs"},
    {"manifest", "retrieval", "loading", "options", "recipe_errors"},
    {"results", "environment", "shipped_recipes", "run_record"},
    {"adapter_format"},
    {"delta"},
    {"ring", "rope"},
    {"capacity"},
    {"train", "adapter", "merge", "transfer", "evaluate", "plan", "search", "doctor", "lineage",
     "gguf"},
    {"recipe", "publish", "run_page"},
    {"recipe_schema", "recipe_inputs"},
    {"decisions"},
    {"recipe_plan"},
    {"run"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """The layer's name for a file: its package, or its own name at the top."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    """Names under `extend.` that the file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("extend.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path):
    own = part(path)
    for other in imported_parts(path) - {own, "__version__"}:
        assert LEVEL[other] < LEVEL[own], f"{path} imports extend.{other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_short(path: Path):
    assert len(path.read_text().splitlines()) <= 340


def test_command_line_does_not_import_torch():
    code = ("import sys, extend, extend.cli, extend.recipe, extend.run, extend.options\n"
            "print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True)
    assert result.stdout.strip() == "[]"


def test_every_stage_has_a_runner():
    from extend.options import STAGES
    from extend.run import RUNNERS

    assert set(STAGES) == set(RUNNERS)
