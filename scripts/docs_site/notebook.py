"""A notebook with its stored outputs as a Markdown page."""

import base64
import json
import re
from pathlib import Path
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def notebook_page(notebook: Path, folder: Path) -> str:
    """The cells of `notebook`; pictures are written to `folder`, beside which the page will lie."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell["outputs"]):
            parts.append(_output(output, folder, f"{notebook.stem}-{number}-{place}.png"))
    return "\n\n".join(filter(None, parts)) + "\n"


def _output(output: dict[str, Any], folder: Path, picture: str) -> str:
    if output["output_type"] == "stream":
        return _text("".join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture).write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![output]({folder.name}/{picture})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return _text("".join(data.get("text/plain", "")))


def _text(text: str) -> str:
    text = _ANSI.sub("", text).strip("\n")
    return f"```text\n{text}\n```" if text else ""
