"""Python of pages: it compiles, and what it takes from `extend` exists, with those parameters.

All is read from the sources; nothing is imported, so that this takes no time.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import extend
from extend.options import STAGES
from extend.registry import option_names
from extend.rope import METHODS
from extend.rope.methods import RESONANCE
from tests.docs.pages import ROOT

Found = ast.FunctionDef | ast.ClassDef | ast.Module | None


def problems(source: str) -> Iterator[str]:
    """What is wrong with Python code that uses `extend`."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"does not compile: {error}"
        return
    names: dict[str, Found] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "extend":
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = _member(node.module, alias.name)
                except LookupError as error:
                    yield str(error)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (_dotted(node) or "").startswith("extend."):
            try:
                resolve(_dotted(node))
            except LookupError as error:
                yield str(error)
        elif isinstance(node, ast.Call):
            yield from _call_problems(node, names)


def resolve(dotted: str) -> Found:
    """What `extend.a.b` is; None for a value, or something that is not followed further.

    Raises:
        LookupError: there is no such thing.
    """
    _, first, *rest = dotted.split(".")
    if first in extend._STAGES:  # the function, although there is a package of that name
        if rest:
            raise LookupError(f"{dotted}: extend.{first} is a function; write `from extend.{first} "
                              f"import {rest[0]}`")
        return _member(extend._STAGES[first], first)
    found: Found = _parsed(_file_of("extend"))
    module = "extend"
    for part in (first, *rest):
        if not isinstance(found, ast.Module):
            return None  # an attribute of an object
        found = _member(module, part)
        module = f"{module}.{part}"
    return found


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _member(module: str, name: str) -> Found:
    file = _file_of(module)
    if not file.is_file():
        raise LookupError(f"{module}: no such module")
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _member(node.module, name)
    for node in _parsed(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return None
    inner = _file_of(f"{module}.{name}")
    if inner.is_file():
        return _parsed(inner)
    raise LookupError(f"{module}: there is no {name}")


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _call_problems(node: ast.Call, names: dict[str, Found]) -> Iterator[str]:
    called = _dotted(node.func) or ""
    try:
        target = resolve(called) if called.startswith("extend.") else names.get(called)
    except LookupError:
        return  # told as an attribute
    if not isinstance(target, ast.FunctionDef):
        return
    takes = target.args
    known = {arg.arg for arg in (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)}
    if len(node.args) > len(takes.args) and takes.vararg is None:
        yield f"{called}: takes {len(takes.args)} positional arguments, not {len(node.args)}"
    if takes.kwarg is not None:  # rescale: the options of its methods; others: those of the stage
        known |= {RESONANCE} | {name for method in METHODS.values() for name in
                                option_names(method)} if target.name == "rescale" else set(
            STAGES[target.name].model_fields if target.name in STAGES else ())
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in known:
            yield f"{called}: takes no {keyword.arg}"
