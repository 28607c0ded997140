"""Readable text out of HTML, reStructuredText, info and source files (used by get_text.py).

Standard library only. Every function returns plain text and leaves it to normalise() to make the
white space regular.
"""

import gzip
import html.parser
import itertools
import re
import unicodedata
from pathlib import Path

WORD_LIST = 12  # so many one-line paragraphs in a row are an index

class HtmlText(html.parser.HTMLParser):
    """Collects the readable text of one page; paragraphs are separated by blank lines."""

    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}
    SKIP_TAGS = {"footer", "form", "head", "nav", "script", "style", "svg"}
    SKIP_NAMES = {"banner", "contents", "docnav", "footnotes-back", "headerlink", "related",
                  "sphinxsidebar", "title-image", "toc", "toctree-wrapper"}
    PARAGRAPHS = {"blockquote", "div", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p",
                  "pre", "section", "table", "ul"}
    LINES = {"br", "dd", "dt", "li", "tr"}

    def __init__(self, main_only: bool) -> None:
        """main_only: keep only what stands inside the element with role="main"."""
        super().__init__(convert_charrefs=True)
        self.main_only = main_only
        self.open_tags: list[tuple[str, bool, bool]] = []  # (tag, skipped, is main)
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._break(tag)
        if tag in self.VOID:
            return
        values = dict(attrs)
        names = set((values.get("class") or "").split())
        # The handbook's page title is a row of logos: <p id="title">.
        skipped = (
            tag in self.SKIP_TAGS
            or bool(names & self.SKIP_NAMES)
            or values.get("id") in ("banner", "title")
        )
        self.open_tags.append((tag, skipped, values.get("role") == "main"))
        if tag == "li" and self._kept():
            self.pieces.append("- ")

    def handle_endtag(self, tag: str) -> None:
        # An end tag without its start tag is ignored; one that closes others closes them too.
        if any(name == tag for name, _, _ in self.open_tags):
            while self.open_tags.pop()[0] != tag:
                pass
        if tag in ("td", "th") and self._kept():
            self.pieces.append("  ")
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._kept():
            return
        if not any(name == "pre" for name, _, _ in self.open_tags):
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _kept(self) -> bool:
        inside = not self.main_only or any(is_main for _, _, is_main in self.open_tags)
        return inside and not any(skipped for _, skipped, _ in self.open_tags)

    def _break(self, tag: str) -> None:
        wanted = 2 if tag in self.PARAGRAPHS else 1 if tag in self.LINES else 0
        # A paragraph right behind a list marker stays on the marker's line.
        if wanted and self._kept() and self.pieces and self.pieces[-1] != "- ":
            self.pieces.append("\n" * wanted)

    def text(self) -> str:
        """Return the page's text, with at most one blank line in a row."""
        joined = re.sub(r"[ \t]+\n", "\n", "".join(self.pieces))
        return re.sub(r"\n{3,}", "\n\n", joined)


def decode(path: Path) -> str:
    """Return a file's text (.gz is unpacked); files older than UTF-8 are read as Latin-1."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def html_text(path: Path) -> str:
    """Return the readable text of an HTML file."""
    page = decode(path)
    parser = HtmlText(main_only='role="main"' in page)
    parser.feed(page)
    parser.close()
    return parser.text()


def rst_text(path: Path) -> str:
    """Return a reStructuredText file without licence tags, labels and tables of contents."""
    text = decode(path)
    text = re.sub(r"(?m)^[ \t]*\.\. +toctree::.*\n(?:[ \t]*\n|[ \t]+\S.*\n?)*", "\n", text)
    text = re.sub(r"(?m)^[ \t]*\.\. +(?:SPDX-|include::|_[^ ].*:[ \t]*$|\|).*\n?", "", text)
    return text


def info_text(path: Path) -> str:
    """Return an info file's prose: no node headers, no menus, no tag table."""
    text = decode(path).split("\x1f\nTag Table:")[0]
    text = re.sub(r"\x1f\nFile: .*\n", "\n", text)
    return re.sub(r"(?m)^\* (?:Menu:|[^\n]*::).*\n(?:[ \t]{20,}\S.*\n)*", "", text)


def code_text(path: Path, root: Path) -> str:
    """Return a source file's text under a line that names it."""
    return f"# {path.relative_to(root).as_posix()}\n\n{decode(path)}"


def normalise(text: str) -> str:
    """Return text with Unix line ends, no control characters and no long runs of one mark."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text.expandtabs(8).replace("\u00a0", " ").replace("\u200b", "")
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff]", "", text)
    text = re.sub(r"([^\w\s])\1{8,}", lambda run: run[1] * 8, text)
    text = re.sub(r"(?<=\S) {5,}", "    ", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def letter_share(text: str) -> float:
    """Return the share of letters among the characters that are not white space."""
    visible = re.sub(r"\s", "", text)
    return sum(map(str.isalpha, visible)) / max(1, len(visible))


def drop_word_lists(text: str) -> str:
    """Return text without runs of WORD_LIST or more one-line paragraphs of a few words."""
    paragraphs = re.split(r"\n\n+(?=\S)", text)
    kept: list[str] = []
    for short, run in itertools.groupby(paragraphs, lambda p: len(p) < 40 and "\n" not in p):
        found = list(run)
        if not short or len(found) < WORD_LIST:
            kept += found
    return "\n\n".join(kept)
