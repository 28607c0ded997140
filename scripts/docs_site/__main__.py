"""Write docs/ with what is generated into a folder that zensical builds the site from.

    python -m docs_site build/docs          (with scripts/ on the path; scripts/docs does it)
"""

import argparse
import shutil
from pathlib import Path

from docs_site.expand import ROOT, expand
from docs_site.mathml import with_mathml
from docs_site.notebook import notebook_page


def write_pages(docs: Path, folder: Path) -> None:
    """Copy `docs` to `folder`, pages expanded, formulas converted, notebooks also as pages."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(docs, folder)
    for page in sorted(folder.rglob("*.md")):
        page.write_text(with_mathml(expand(page.read_text(encoding="utf-8"))), encoding="utf-8")
    for notebook in sorted(folder.glob("*.ipynb")):
        page = notebook.with_suffix(".md")
        page.write_text(notebook_page(notebook, folder / f"{notebook.stem}-output"),
                        encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    write_pages(ROOT / "docs", parser.parse_args().folder.resolve())


if __name__ == "__main__":
    main()
