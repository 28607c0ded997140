#!/usr/bin/env python3
"""Run a notebook and keep what its cells printed.

    pip install -e '.[docs]' nbclient ipykernel
    python scripts/run_notebook.py docs/demo.ipynb

The cells run in order in a fresh kernel, with the `extend` of this interpreter's environment first
on the path. The file is written only when all of them have run. What they wrote to stderr
(progress, warnings of libraries about this machine) and when they ran is not kept.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs without stderr, texts that follow one another as one."""
    kept: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for a cell")
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    notebook = nbformat.read(args.notebook, as_version=4)
    NotebookClient(notebook, timeout=args.timeout, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(args.notebook.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    partial = args.notebook.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(args.notebook)


if __name__ == "__main__":
    main()
