"""Options as Markdown tables: of commands from click, of recipe stages from their option models."""

import re
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PARSERS = {"parse_length": "length", "parse_bytes": "size", "parse_number": "number",
            "parse_strategy": "strategy", "_parse_rope": "`auto`, or a mapping"}
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`",
          Any: "anything", type(None): "none"}
_PATH = "path (or name of an earlier stage)"
_MODEL = "path or Hub id (or name of an earlier stage)"
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars and line breaks in cells are taken care of."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def command_table(command: click.Command, name: str, without: Collection[str] = ()) -> str:
    """How a command is called, and a table of its arguments and options.

    Args:
        without: the first names of options that are left out.
    """
    context = click.Context(command, info_name=f"extend {name}")
    usage = " ".join([f"extend {name}", *command.collect_usage_pieces(context)])
    return f"```text\n{usage}\n```\n\n" + parameter_table(
        [parameter for parameter in command.get_params(context)
         if parameter.opts[0] not in without], context)


def parameter_table(parameters: Sequence[click.Parameter], context: click.Context) -> str:
    """A table of arguments and options, hidden ones left out."""
    rows = [_parameter(parameter, context) for parameter in parameters
            if not getattr(parameter, "hidden", False)]
    heads = ("argument or option", "default", "what it is")
    return table(heads, rows)


def _parameter(parameter: click.Parameter, context: click.Context) -> tuple[str, str, str]:
    if isinstance(parameter, click.Argument):
        return f"`{parameter.make_metavar(context)}`", "", \
            "required" if parameter.required else "may be left out"
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    values = "" if parameter.is_flag else f" {parameter.make_metavar(context)}"
    default = parameter.get_default(context)
    told = "required" if parameter.required else "" if parameter.is_flag or _is_empty(default) \
        else f"`{_plain(default)}`"
    return f"`{names}{values}`", told, literal(_help(parameter))


def _help(option: click.Option) -> str:
    text = (option.help or "").strip()
    again = option.multiple and "again" not in text and "repeated" not in text
    return f"{text} May be repeated." if again else text


def literal(text: str) -> str:
    """Text of a help page as Markdown that shows it as it is."""
    return re.sub(r"([*_<>\[\]])", r"\\\1", text) if "`" not in text else text


def _is_empty(default: Any) -> bool:
    return default in (None, "", (), []) or default is False or "UNSET" in repr(default)


def _plain(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def stage_tables(model: type[BaseModel]) -> str:
    """The keys of a stage, then of every mapping inside it."""
    parts = [_keys(model)]
    parts += [f"**{place}: {_summary(inner)}**\n\n{_keys(inner)}"
              for place, inner in _inner_models(model)]
    return "\n\n".join(parts)


def _keys(model: type[BaseModel]) -> str:
    rows = [(f"`{name}`", _default(field), " ".join(
        filter(None, (_capital(describe(field.annotation, field.metadata)) + ".",
                      field.description))))
            for name, field in model.model_fields.items()]
    return table(("key", "default", "what it is"), rows)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).split("\n\n")[0].strip().rstrip(".")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ([], {}, ""):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _inner_models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    seen: set[type] = set()
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                kind = inner.model_fields.get("kind")
                told = f" with `kind: {get_args(kind.annotation)[0]}`" if kind else ""
                yield f"`{name}`{told}", inner
                for place, deeper in _inner_models(inner):
                    if deeper not in seen:
                        seen.add(deeper)
                        yield f"`{name}`, {place}", deeper


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The option models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, for a reader who writes YAML."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return describe(inner, [*more, *metadata])
    base = next((told for entry in metadata
                 if (told := _PARSERS.get(getattr(getattr(entry, "func", None), "__name__", "")))),
                None)
    if annotation is Any:
        base = _PLAIN[Any]
    if "input path" in metadata:
        base = _MODEL if "or Hub id" in metadata else _PATH
    return (base or _describe_type(annotation)) + _bounds(metadata)


def _describe_type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _choice([f"`{str(part).lower() if isinstance(part, bool) else part}`"
                        for part in parts])
    if origin in (Union, types.UnionType):
        return _choice([told for part in parts if part is not type(None)
                        for told in _alternatives(part)])
    if origin is list:
        return f"list of {_plural(describe(parts[0]))}"
    if origin is tuple:
        return " and ".join(describe(part) for part in parts)
    if origin is dict:
        return f"mapping of {describe(parts[0])} to {describe(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping, see below"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _alternatives(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["`true`", "`false`"]
    if get_origin(annotation) is Literal:
        return [f"`{part}`" for part in get_args(annotation)]
    return [describe(annotation)]


def _plural(text: str) -> str:
    if text.startswith("whole number"):
        return text.replace("whole number", "whole numbers", 1)
    return {_PATH: "paths (or names of earlier stages)", "text": "texts",
            _MODEL: "paths or Hub ids (or names of earlier stages)",
            "number": "numbers", "length": "lengths",
            "mapping, see below": "mappings, see below"}.get(text, text)


def _choice(parts: Sequence[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _bounds(metadata: Sequence[Any]) -> str:
    limits = [f"{word} {getattr(entry, key)}" for entry in _flat(metadata)
              for key, word in _BOUNDS.items() if getattr(entry, key, None) is not None]
    return f", {' and '.join(limits)}" if limits else ""


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from entry.metadata
        else:
            yield entry
