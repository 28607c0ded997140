"""What pyproject.toml says of the package; scripts/check_package builds, installs and uses it."""

import re
import sys
import tomllib
from pathlib import Path

import extend

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "extend"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
# Packages by another name than the one they are imported by.
MODULES = {"pyyaml": "yaml"}
# Used where they are, and nothing is asked of them: CUDA builds of torch bring the first.
UNDECLARED = {"triton", "flash_attn"}


def module_of(requirement: str) -> str:
    name = re.match(r"[\w-]+", requirement).group().lower()
    return MODULES.get(name, name).replace("-", "_")


def imported(path: Path) -> set[str]:
    """First parts of the modules that a file imports anywhere."""
    lines = re.findall(r"^ *(?:import (\w+)|from (\w+)[\w.]* import )", path.read_text(), re.M)
    return {name for pair in lines for name in pair if name}


def test_every_file_that_is_not_python_is_installed():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["extend"]
    matched = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    there = {path for path in PACKAGE.rglob("*") if path.is_file()
             and path.suffix not in (".py", ".pyc")}
    assert there and there <= matched


def test_every_directory_with_python_files_is_a_package():
    """`packages.find` passes over others without a word."""
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path


def test_what_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {module_of(text) for texts in (PROJECT["dependencies"], *extras.values())
                for text in texts}
    used = set().union(*map(imported, PACKAGE.rglob("*.py")))
    assert used - sys.stdlib_module_names - {"extend"} - UNDECLARED <= declared
    assert {module_of(text) for text in PROJECT["dependencies"]} <= used


def test_python_versions_are_told_once_more_alike():
    told = {text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"]
            if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", text)}
    assert PROJECT["requires-python"] == f">={min(told, key=lambda v: int(v[2:]))}"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py" + min(told).replace(".", "")


def test_the_version_has_its_own_form():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", extend.__version__)
