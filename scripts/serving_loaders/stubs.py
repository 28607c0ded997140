"""Import some files of a package as they are, and put mocks in the place of all others."""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


class _Mock(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return self.__dict__[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, root: Path, real: Iterable[str]):
        self.package, self.root, self.real = package, root, frozenset(real)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.root / (name.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Mock(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(package: str, root: Path, real: Iterable[str]) -> None:
    """Let `package` be imported from `root`: the modules `real` as they are, all others mocked."""
    sys.meta_path.insert(0, _Finder(package, root, real))


def functions(path: Path, names: Iterable[str], environment: dict[str, Any]) -> dict[str, Callable]:
    """Compile some functions of a file that cannot be imported whole."""
    wanted = set(names)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            code = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), node],
                              [])
            exec(compile(ast.fix_missing_locations(code), str(path), "exec"), environment)
    return {name: environment[name] for name in wanted if name in environment}
