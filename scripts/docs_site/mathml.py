"""`$...$` and `$$...$$` as MathML, which browsers draw without a script."""

import re

_CODE = re.compile(r"(^ *```.*?^ *```\s*?$|^(?: {4}|\t).*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^\$\$\s*(.+?)\s*\$\$$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])")


def with_mathml(markdown: str) -> str:
    """Replace formulas outside of code."""
    if "$" not in markdown:
        return markdown
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _replace(part) for index, part in enumerate(parts))


def _replace(text: str) -> str:
    text = _BLOCK.sub(
        lambda found: f'<div class="formula">{_convert(found[1], "block")}</div>', text)
    return _INLINE.sub(lambda found: f"<span>{_convert(found[1], 'inline')}</span>", text)


def _convert(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return convert(" ".join(latex.split()), display=display)
