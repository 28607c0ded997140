"""How arguments are read: lengths, lists, `key=value` pairs."""

from collections.abc import Collection
from typing import Any

import click


class _LengthType(click.ParamType):
    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from extend.option_types import parse_length

        try:
            return parse_length(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ListType(click.ParamType):
    """Values separated by commas."""

    def __init__(self, item: click.ParamType | None = None):
        self.item, self.name = item, "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        return [self.item.convert(p, param, ctx) if self.item else p for p in parts]


class NameType(click.ParamType):
    """One of a family's names; suggests the one that was probably meant."""

    name = "name"

    def __init__(self, names: Collection[str]):
        self.names = tuple(names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from extend.registry import suggest

        if value not in self.names:
            self.fail(f"unknown {value!r};{suggest(value, self.names)} choose one of "
                      f"{', '.join(self.names)}", param, ctx)
        return value


LENGTH = _LengthType()


def parse_pairs(pairs: tuple[str, ...], reserved: Collection[str] = ()) -> dict[str, Any]:
    """`key=value` pairs as a dict; values that read as numbers or booleans become them.

    Args:
        pairs: what was given with `--option`.
        reserved: names that a RoPE method's option cannot have.

    Raises:
        RecipeError: a pair without `=`, a value that is no YAML, or a reserved name.
    """
    import yaml

    from extend.errors import RecipeError
    from extend.option_types import parse_number

    found = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise RecipeError(f"--option {pair!r}: write it as key=value")
        if key in reserved:
            raise RecipeError(f"--option {pair!r}: {key} is no option of a RoPE method")
        try:
            found[key] = parse_number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise RecipeError(f"--option {pair!r}: its value cannot be read; write a number, text "
                              "or a list, [1, 2], in quotes for the shell") from None
    return found


def parse_numbers(value: str | None) -> list[float] | str | None:
    """Numbers separated by commas as a list; anything else, such as a path, as it is."""
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        return value
