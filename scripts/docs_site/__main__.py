"""Write what zensical builds the site from: docs/ with what is generated, and mkdocs.yml.

    python -m docs_site build          (with scripts/ on the path; scripts/docs does it)
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

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


def write_config(folder: Path) -> None:
    """mkdocs.yml for `folder`, pages that it does not name yet at the end of the navigation."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    more = unlisted(config["nav"], folder / "docs")
    if more:
        config["nav"].append({"More": [{title_of(folder / "docs" / page): page}
                                       for page in more]})
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def unlisted(nav: list[Any], docs: Path) -> list[str]:
    """Pages that no entry names; those of results are reached from their own page."""
    there = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    return sorted(page for page in there - set(listed(nav)) if not page.startswith("results/"))


def listed(nav: list[Any]) -> Iterator[str]:
    """Pages that the navigation names."""
    for entry in nav:
        for value in entry.values():
            yield from listed(value) if isinstance(value, list) else [value]


def title_of(page: Path) -> str:
    """Its first heading."""
    return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    write_pages(ROOT / "docs", folder / "docs")
    write_config(folder)


if __name__ == "__main__":
    main()
