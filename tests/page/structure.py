"""What a page must be for browsers, screen readers and a disk without a network."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from tests.page.reader import VOID

LOADING = ("src", "srcset", "data", "action", "poster", "background", "xlink:href")


class Structure(HTMLParser):
    """Reads a page's ids, links, headings, tables and drawings."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.tags: list[str] = []
        self.problems: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._look(tag, found)
        if tag not in VOID:
            self._open.append((tag, found))

    def handle_startendtag(self, tag, attributes):
        self._look(tag, dict(attributes))

    def _look(self, tag, found):
        self.tags.append(tag)
        if found.get("id") is not None:
            self.ids.append(found["id"])
        self.problems += [f"{tag} has {name}" for name in found
                          if name in LOADING or name.startswith("on")]
        if tag == "a":
            self.links.append(found.get("href") or "")
        if tag == "svg" and not (found.get("role") == "img" and found.get("aria-label")):
            self.problems.append("a drawing without words")
        if tag == "th" and found.get("scope") not in ("col", "row", "colgroup"):
            self.problems.append("a table's header without scope")
        if tag == "table" and not self._boxed():
            self.problems.append("a table outside a named box that scrolls")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def _boxed(self) -> bool:
        return any(found.get("class") == "scroll" and found.get("aria-label")
                   and found.get("tabindex") == "0" for _, found in self._open)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if self._open and re.fullmatch("h[1-6]", self._open[-1][0]):
            level, said = self.headings[-1]
            self.headings[-1] = (level, said + data)

    def check(self, directory: Path) -> None:
        """Assert everything; links lead to ids of the page or to files under `directory`."""
        assert self.problems == []
        assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(
            self.tags)
        assert re.search(r"url\(|@import|https?:|//[a-z]", self._styles()) is None
        assert len(self.ids) == len(set(self.ids))
        levels = [level for level, _ in self.headings]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), self.headings
        assert all(said.strip() for _, said in self.headings)
        for link in self.links:
            if link.startswith("#"):
                assert link[1:] in self.ids, link
            else:
                assert ":" not in link and not link.startswith("/"), link
                assert (directory / unquote(link)).is_file(), link
        for needed in ('<html lang="en">', 'name="viewport"', "prefers-color-scheme: dark",
                       "@media print", "default-src 'none'"):
            assert needed in self.text
        assert self.tags.count("main") == self.tags.count("nav") == 1

    def _styles(self) -> str:
        return " ".join(re.findall(r"<style>(.*?)</style>", self.text, re.DOTALL)
                        + re.findall(r'style="([^"]*)"', self.text))
