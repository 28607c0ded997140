"""Put what is generated from the code where a page asks for it.

    <!-- generated: command rescale -->      the arguments and options of `extend rescale`
    <!-- generated: stage rescale -->        the keys of the stage in a recipe
    <!-- generated: methods -->              RoPE methods; also: tasks, merge-methods
    <!-- generated: commands -->             every command; also: stages, api, recipes, errors

A plain Markdown viewer shows nothing for such a line.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import click

import extend
from docs_site.families import family_table, first_paragraph
from docs_site.tables import command_table, literal, parameter_table, stage_tables, table
from extend import errors

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^<!-- generated: ([a-z-]+)(?: ([a-z0-9_-]+))? -->$", re.MULTILINE)


def expand(markdown: str) -> str:
    """The page with every marker replaced.

    Raises:
        KeyError: a marker that names nothing there is.
    """
    return MARKER.sub(lambda found: generate(found[1], found[2]), markdown)


def generate(kind: str, name: str | None = None) -> str:
    """What stands for one marker."""
    made = GENERATORS[kind]
    return made(name) if name else made()


def commands() -> dict[str, click.Command]:
    """Every command of the command line, by the words that call it."""
    from extend.cli import main

    found: dict[str, click.Command] = {}
    for name, command in sorted(main.commands.items()):
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": made for inner, made in sorted(command.commands.items())}
        elif not command.hidden:
            found[name] = command
    return found


def _common() -> dict[str, click.Parameter]:
    """Options that every command has, by their first names."""
    found = [{parameter.opts[0]: parameter
              for parameter in command.get_params(click.Context(command))}
             for command in commands().values()]
    return {name: parameter for name, parameter in found[0].items()
            if all(name in others for others in found)}


def _command(name: str) -> str:
    shared = _common()
    told = ", ".join(f"`{parameter.opts[-1]}`" for parameter in shared.values())
    return f"{command_table(commands()[name], name, shared)}\n\nAnd what every command has: {told}."


def _common_options() -> str:
    name, command = next(iter(commands().items()))
    return parameter_table(list(_common().values()), click.Context(command, info_name=name))


def _all_commands() -> str:
    shared = _common()
    return "\n\n".join(
        f"## extend {name}\n\n{_help(command)}\n\n{command_table(command, name, shared)}"
        for name, command in commands().items())


def _help(command: click.Command) -> str:
    """The text of a help page; its examples as a block."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    if command.epilog:
        paragraphs += inspect.cleandoc(command.epilog).split("\n\n")
    return "\n\n".join(_paragraph(text) for text in paragraphs)


def _paragraph(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() != "\b"]
    if any(line.lstrip().startswith(("extend ", "torchrun ")) for line in lines):
        return "```sh\n" + inspect.cleandoc("\n".join(lines)) + "\n```"
    return literal(" ".join(line.strip() for line in lines))


def _stage(name: str) -> str:
    from extend.options import STAGES

    return stage_tables(STAGES[name])


def _all_stages() -> str:
    from extend.options import STAGES

    return "\n\n".join(f"## {name}\n\n{_about(model)}\n\n{stage_tables(model)}"
                       for name, model in STAGES.items())


def _about(model: type) -> str:
    text = first_paragraph(model).partition(": ")[2]
    return text[:1].upper() + text[1:]


def _methods() -> str:
    from extend.rope import METHODS

    return family_table(METHODS, "method")


def _merge_methods() -> str:
    from extend.merge import METHODS

    return family_table(METHODS, "method")


def _tasks() -> str:
    from extend.evaluate.tasks import GROUPS, TASKS

    groups = table(("name", "stands for"), [
        (f"`{name}`", ", ".join(f"`{member}`" for member in members))
        for name, members in GROUPS.items()])
    return f"{family_table(TASKS, 'task')}\n\n{groups}"


def _errors() -> str:
    made = [found for found in vars(errors).values()
            if isinstance(found, type) and issubclass(found, errors.ExtendError)]
    return table(("error", "what it is about"),
                 [(f"`extend.errors.{error.__name__}`", first_paragraph(error)) for error in made])


def _recipes() -> str:
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    return "\n\n".join(f"## {file.name}\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"
                       for file in files)


def _api() -> str:
    stages = {name: home_of(module, name) for name, module in extend._STAGES.items()}
    ring = {f"ring.{name}": home_of("extend.ring", name)
            for name in _exported("extend.ring") if not name.isupper() and name != "RingComm"}
    return "\n\n".join(_directive(name, home) for name, home in (stages | ring).items())


def _directive(name: str, home: str) -> str:
    return f"::: {home}\n    options: {{heading: extend.{name}, toc_label: {name}}}"


def _exported(package: str) -> list[str]:
    tree = ast.parse(_file_of(package).read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")


def home_of(module: str, name: str) -> str:
    """Where a function that a module exports is defined, without importing it.

    (A package's function often has the name of the module that defines it.)
    """
    for node in ast.walk(ast.parse(_file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return home_of(node.module, name)
    return f"{module}.{name}"


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


GENERATORS: dict[str, Callable[..., str]] = {
    "command": _command,
    "commands": _all_commands,
    "common-options": _common_options,
    "stage": _stage,
    "stages": _all_stages,
    "methods": _methods,
    "merge-methods": _merge_methods,
    "tasks": _tasks,
    "errors": _errors,
    "recipes": _recipes,
    "api": _api,
}
