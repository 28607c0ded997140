"""How arguments are read: lengths, lists, `key=value` pairs."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem


class _LengthType(click.ParamType):
    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from extend.option_types import parse_length

        try:
            return parse_length(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ListType(click.ParamType):
    """Values separated by commas.

    Args:
        item: type of each; text unless given.
        names: gives what a shell may complete them to.
    """

    name = "list"

    def __init__(self, item: click.ParamType | None = None,
                 names: Callable[[], Iterable[str]] = tuple):
        self.item, self.names = item, names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        return [self.item.convert(p, param, ctx) if self.item else p for p in parts]

    def shell_complete(self, ctx: click.Context, param: click.Parameter,
                       incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in self.names()
                if name.startswith(last)]


class Choice(click.Choice):
    """One of some names; suggests the one that was probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from extend.registry import suggest

        if value not in self.choices:
            self.fail(f"unknown {value!r};{suggest(str(value), self.choices)} choose one of "
                      f"{', '.join(self.choices)}", param, ctx)
        return value


class NameType(Choice):
    """One of a family's names, too many for a line of help."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "NAME"


class OpenName(click.ParamType):
    """Text for which there are names that a shell may complete it to.

    Args:
        names: gives them.
    """

    name = "name"

    def __init__(self, names: Callable[[], Iterable[str]]):
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter,
                       incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


class PathType(click.ParamType):
    """Text that a shell completes to a path; whether it is one, the stages say."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter,
                       incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


DTYPE = Choice(["float32", "bfloat16", "float16"])
LENGTH = _LengthType()


def parse_labels(items: Sequence[str], command: str) -> dict[str, str]:
    """`LABEL=PATH` arguments as a dict.

    Raises:
        RecipeError: one of another form, or a label twice.
    """
    from extend.errors import RecipeError

    labelled = dict(item.partition("=")[::2] for item in items)
    if len(labelled) != len(items) or not all(labelled.values()):
        raise RecipeError(f"{command}: write each result once as LABEL=PATH; given "
                          + " ".join(items))
    return labelled


def parse_pairs(pairs: tuple[str, ...], reserved: Collection[str] = ()) -> dict[str, Any]:
    """`key=value` pairs as a dict; values that read as numbers or booleans become them.

    Args:
        pairs: what was given with `--option`.
        reserved: names that a RoPE method's option cannot have.

    Raises:
        RecipeError: a pair without `=`, a value that is no YAML, or a reserved name.
    """
    from extend.errors import RecipeError
    from extend.option_types import parse_number
    from extend.untrusted import load_yaml

    found = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise RecipeError(f"--option {pair!r}: write it as key=value")
        if key in reserved:
            raise RecipeError(f"--option {pair!r}: {key} is no option of a RoPE method")
        try:
            found[key] = parse_number(load_yaml(value))
        except ValueError:
            raise RecipeError(f"--option {pair!r}: its value cannot be read; write a number, text "
                              "or a list, [1, 2], in quotes for the shell") from None
    return found


def parse_numbers(value: str | None) -> list[float] | str | None:
    """Numbers separated by commas as a list; anything else, such as a path, as it is."""
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        return value
