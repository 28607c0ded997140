"""Named members of the code's families as Markdown: RoPE methods, evaluation tasks, and so on."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from docs_site.tables import table
from extend.registry import option_names

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Note):", re.MULTILINE)


def family_table(members: Mapping[str, Callable[..., Any]], head: str) -> str:
    """Name, what it is (its docstring's first paragraph) with the source, and its options."""
    rows = []
    for name, member in members.items():
        source = source_of(member)
        said = first_paragraph(member) + (f" Source: {source}" if source else "")
        rows.append((f"`{name}`", said, ", ".join(_option(*item)
                                                  for item in option_names(member).items())))
    return table((head, "what it is", "options"), rows)


def _option(name: str, parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"`{name}` (required)"
    return f"`{name}` ({_shown(parameter.default)})"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"([*_<>])", r"\\\1", str(value))


def first_paragraph(member: Any) -> str:
    """The docstring as far as its first empty line, as text that Markdown leaves alone."""
    text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    return _plain(text)


def source_of(member: Any) -> str:
    """What follows `Source:` in the docstring, or an empty string."""
    doc = inspect.getdoc(member) or ""
    found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return linked(_plain(" ".join(found[1].split()))) if found else ""


def linked(text: str) -> str:
    """Numbers of arXiv papers as links."""
    return re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _plain(text: str) -> str:
    """Escape what Markdown would read in text, but not in `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>])", r"\\\1", part)
                   for part in parts)
