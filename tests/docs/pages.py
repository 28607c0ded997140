"""What README.md, docs/**/*.md and the notebooks hold: blocks of code, code in a line, links."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from docs_site.expand import expand
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs/results"
"""Commands there are those of the commit that was measured, and stay as they were."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: the word behind the fence; "" for an indented block.
        marker: the comment on the line before, without its arrows; "" if there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page, records of results included."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written_pages() -> list[Path]:
    """Pages that speak of the code as it is now."""
    return [page for page in pages() if RECORDS not in page.parents]


def notebooks() -> list[Path]:
    return sorted((ROOT / "docs").glob("[!.]*.ipynb"))


@cache
def expanded(page: Path) -> str:
    """The page as the site has it: with what is generated from the code."""
    return expand(page.read_text(encoding="utf-8"))


@cache
def parsed(text: str) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(text))


def tokens(page: Path) -> tuple[Token, ...]:
    """Of the page as it is written."""
    return parsed(page.read_text(encoding="utf-8"))


def blocks() -> Iterator[Block]:
    """Blocks of code of all written pages, generated ones too, and the cells of the notebooks."""
    for page in written_pages():
        yield from page_blocks(page, parsed(expanded(page)))
    for notebook in notebooks():
        for number, cell in enumerate(cells(notebook)):
            if cell["cell_type"] == "code":
                yield Block(notebook, number, "notebook", "".join(cell["source"]))


def page_blocks(page: Path, found: tuple[Token, ...]) -> Iterator[Block]:
    marker = ""
    for token in found:
        if token.type in ("fence", "code_block"):
            words = token.info.split()
            yield Block(page, token.map[0] + 1, words[0] if words else "",
                        textwrap.dedent(token.content), marker)
        marker = token.content.strip().removeprefix("<!--").removesuffix("-->").strip() \
            if token.type == "html_block" else ""


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_in_lines(page: Path) -> Iterator[tuple[str, str]]:
    """(where, code) of every `code` in running text and tables."""
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "code_inline":
                line = token.map[0] + 1 if token.map else 0
                yield f"{page.relative_to(ROOT)}:{line}", child.content


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield str(target)


def anchors(markdown: str) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    for heading, inline in pairwise(parsed(markdown)):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, last in found.items() for n in range(last + 1)}
