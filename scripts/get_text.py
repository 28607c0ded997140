#!/usr/bin/env python3
"""Build a corpus of long documents from Debian packages and the Python standard library.

    python scripts/get_text.py --out data/text               # gets the packages with apt-get
    python scripts/get_text.py --out data/text --debs DIR    # uses .deb files already in DIR

Writes train/<source>/*.txt, heldout-docs/*.txt (documents of the trained kind, never in train),
heldout-prose/*.txt (the Jargon File, a kind never trained on) and manifest.json, which lists the
hash and size of every file and every document that was dropped, with the reason. Standard library
only. The same packages and the same Python version give the same bytes.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from plain_text import (
    code_text,
    decode,
    drop_word_lists,
    html_text,
    info_text,
    letter_share,
    normalise,
    rst_text,
)

PACKAGES = ("linux-doc-6.1", "python3.11-doc", "debian-handbook", "emacs-common", "jargon-text",
            "anarchism")
MIN_CHARS = 300_000  # a document ends at a folder's end once it is this long
MAX_CHARS = 600_000  # and in any case after the file that makes it this long (about 150K tokens)
HELDOUT_EVERY = 8  # of every 8 documents of a held-out source, the fifth is held out
HELDOUT_SOURCES = ("linux", "python-doc")
MIN_FILE_CHARS = 400  # what is shorter is an index or a stub
MIN_LETTERS = 0.5  # share of letters among the visible characters; less is a table or a dump
MAX_TABLE_LINES = 0.35  # share of table rows among a file's lines
LONG_PARAGRAPH = 200  # paragraphs from here on are kept once in the whole corpus

# Tables and descriptions of single devices, other languages, and the smaller architectures.
LINUX_LEFT_OUT = {
    "ABI", "cdrom", "devicetree", "fb", "features", "hwmon", "ia64", "images", "isdn", "leds",
    "m68k", "parisc", "pcmcia", "sh", "sparc", "sphinx-static", "translations", "w1",
}
# Tests, data in the form of code, a copy of the documentation, and retired packages.
STDLIB_LEFT_OUT = {
    "__pycache__", "_bundled", "dist-packages", "distutils", "encodings", "idlelib", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}
TABLE_ROW = re.compile(r"\s*(?:[*|] |- \S+$|\+[-=])")
ANARCHISM_PARTS = ("vol1intro", "intro", *(f"sec{letter}" for letter in "ABCDEFGHIJ"), "append")
EMACS_FILES = (
    "etc/NEWS*", "etc/*-NEWS", "etc/PROBLEMS", "etc/DEBUG", "etc/TODO", "etc/tutorials/TUTORIAL",
)


def reason_to_drop(text: str) -> str | None:
    """Return why a file is no document, or None."""
    if len(text) < MIN_FILE_CHARS:
        return f"shorter than {MIN_FILE_CHARS} characters"
    if letter_share(text) < MIN_LETTERS:
        return f"less than {MIN_LETTERS:.0%} letters"
    lines = text.splitlines()
    if sum(bool(TABLE_ROW.match(line)) for line in lines) > MAX_TABLE_LINES * len(lines):
        return f"more than {MAX_TABLE_LINES:.0%} rows of tables"
    letters = [char for char in text if char.isalpha()]
    if sum(not char.isascii() for char in letters) > 0.1 * len(letters):
        return "more than 10% letters outside ASCII"
    return None


def linked_order(index: Path, pages: list[Path]) -> list[Path]:
    """Return pages in the order in which the index links to them, then the others by name."""
    places: dict[str, int] = {}
    for link in re.findall(r'href="([^"#:]+\.html)', decode(index)):
        places.setdefault(link, len(places))
    key = {page: page.relative_to(index.parent).as_posix() for page in pages}
    return sorted(pages, key=lambda page: (places.get(key[page], len(places)), key[page]))


def natural(path: Path) -> list:
    """Sort key: section 2 before 10, an introduction first, a conclusion last."""
    name = re.sub("con$", "99", re.sub("int$", "0", path.stem))
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def linux_files(root: Path) -> list[tuple[str, str]]:
    docs = root / "usr/share/doc/linux-doc-6.1/Documentation"
    paths = sorted(path for end in ("rst", "txt") for path in docs.rglob(f"*.{end}.gz"))
    kept = [p for p in paths if p.relative_to(docs).parts[0] not in LINUX_LEFT_OUT]
    return [(p.relative_to(docs).as_posix(), rst_text(p)) for p in kept]


def python_doc_files(root: Path) -> list[tuple[str, str]]:
    docs = root / "usr/share/doc/python3.11/html"
    pages = [p for p in docs.glob("*/*.html") if p.parent.name[0] != "_"]
    ordered = linked_order(docs / "contents.html", pages)
    return [(p.relative_to(docs).as_posix(), html_text(p)) for p in ordered]


def handbook_files(root: Path) -> list[tuple[str, str]]:
    docs = root / "usr/share/doc/debian-handbook/html/en-US"
    pages = [p for p in docs.glob("*.html") if p.name not in ("index.html", "ix01.html")]
    ordered = linked_order(docs / "index.html", pages)
    return [(f"handbook/{p.name}", html_text(p)) for p in ordered]


def anarchism_files(root: Path) -> list[tuple[str, str]]:
    docs = root / "usr/share/doc/anarchism/html"
    found = []
    for part in ANARCHISM_PARTS:
        pages = sorted(docs.glob(f"{part}*.html"), key=natural)
        found += [(f"{part}/{p.name}", html_text(p)) for p in pages]
    return found


def emacs_files(root: Path) -> list[tuple[str, str]]:
    version = next((root / "usr/share/emacs").glob("[0-9]*"))
    paths = sorted({path for pattern in EMACS_FILES for path in version.glob(pattern)})
    info = sorted((root / "usr/share/info/emacs").glob("*.info.gz"))
    texts = [(f"etc/{p.name}", decode(p)) for p in paths]
    return texts + [(f"info/{p.name}", info_text(p)) for p in info]


def stdlib_files(_: Path) -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not STDLIB_LEFT_OUT & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    )
    return [(p.relative_to(root).as_posix(), code_text(p, root)) for p in paths]


def jargon_files(root: Path) -> list[tuple[str, str]]:
    path = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    return [("jargon/jargon.txt.gz", re.sub("(?m)^   ", "", decode(path)))]


# Held-out prose comes first, so that a paragraph that two sources share stays out of train.
SOURCES = {
    "jargon": ("jargon-text", jargon_files),
    "linux": ("linux-doc-6.1", linux_files),
    "python-doc": ("python3.11-doc", python_doc_files),
    "stdlib": (None, stdlib_files),
    "handbook": ("debian-handbook", handbook_files),
    "anarchism": ("anarchism", anarchism_files),
    "emacs": ("emacs-common", emacs_files),
}


def group(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbouring files into long documents: [(name, text)], named after the first file."""
    documents: list[list[tuple[str, str]]] = [[]]
    for file in files:
        size = sum(len(text) for _, text in documents[-1])
        last = documents[-1][-1][0] if documents[-1] else file[0]
        changed = os.path.dirname(last) != os.path.dirname(file[0])
        if size >= MAX_CHARS or (size >= MIN_CHARS and changed):
            documents.append([])
        documents[-1].append(file)
    if len(documents) > 1 and sum(len(text) for _, text in documents[-1]) < MIN_CHARS:
        tail = documents.pop()
        documents[-1] += tail
    named = []
    for number, document in enumerate(documents):
        first = document[0][0].split(".")[0].lower()
        slug = re.sub(r"[^a-z0-9]+", "-", first).strip("-")
        named.append((f"{number:03d}-{slug}", "\n\n".join(text for _, text in document)))
    return named


def keep_new_paragraphs(text: str, seen: set[bytes]) -> str:
    """Return text without long paragraphs already in seen, and without tables of numbers."""
    kept = []
    for paragraph in re.split(r"\n\n(?=\S)", text):
        if len(paragraph) >= LONG_PARAGRAPH:
            digest = hashlib.sha1(" ".join(paragraph.split()).encode()).digest()
            if digest in seen or letter_share(paragraph) < MIN_LETTERS:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept)


def split_of(source: str, number: int) -> str:
    """Return the folder of a source's n-th document."""
    if source == "jargon":
        return "heldout-prose"
    held_out = source in HELDOUT_SOURCES and number % HELDOUT_EVERY == 4
    return "heldout-docs" if held_out else f"train/{source}"


def unpack(debs: Path | None, work: Path) -> dict[str, tuple[Path, Path]]:
    """Return {package: (.deb file, folder it is unpacked in)} for every package.

    Raises SystemExit when a package cannot be had.
    """
    if debs is None:
        debs = work / "debs"
        debs.mkdir()
        result = subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=False)
        if result.returncode:
            sys.exit(
                f"apt-get download failed for {' '.join(PACKAGES)} (Debian 12 has them all). Put "
                "the .deb files into a folder and pass it with --debs."
            )
    unpacked = {}
    for package in PACKAGES:
        found = sorted(debs.glob(f"{package}_*.deb"))
        if not found:
            sys.exit(f"No {package}_*.deb in {debs}; it needs all of: {' '.join(PACKAGES)}.")
        unpacked[package] = (found[-1], work / package)
        subprocess.run(["dpkg-deb", "-x", found[-1], work / package], check=True)
    return unpacked


def collect(source: str, root: Path | None, dropped: list[dict]) -> list[tuple[str, str]]:
    """Return a source's documents as [(path in the corpus, text)]; append to dropped."""
    kept = []
    for name, raw in SOURCES[source][1](root):
        text = drop_word_lists(normalise(raw))
        reason = reason_to_drop(text)
        if reason:
            dropped.append({"source": source, "file": name, "reason": reason})
        else:
            kept.append((name, text))
    if not kept:
        sys.exit(f"Source {source} has no documents left: the package has another layout.")
    documents = group(kept)
    return [
        (f"{split_of(source, number)}/{source}-{name}.txt", text)
        for number, (name, text) in enumerate(documents)
    ]


def build(unpacked: dict[str, tuple[Path, Path]], out: Path) -> dict:
    """Write the corpus below out and return its manifest."""
    dropped: list[dict] = []
    documents = []
    for source, (package, _) in SOURCES.items():
        root = unpacked[package][1] if package else None
        documents += [(source, *document) for document in collect(source, root, dropped)]
    documents.sort(key=lambda document: document[1].startswith("train/"))
    seen: set[bytes] = set()
    files = []
    for source, name, text in documents:
        data = (keep_new_paragraphs(text, seen).strip() + "\n").encode()
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = {"path": name, "source": source, "chars": len(data.decode()), "bytes": len(data)}
        files.append(entry | {"sha256": sha256})
    packages = {
        deb.name: hashlib.sha256(deb.read_bytes()).hexdigest() for deb, _ in unpacked.values()
    }
    manifest = {"schema": 1, "python": platform.python_version(), "packages": packages}
    return manifest | {"files": sorted(files, key=lambda f: f["path"]), "dropped": dropped}


def print_table(manifest: dict) -> None:
    """Print characters per folder, and how many files were dropped for which reason."""
    print(f"{'folder':<20}{'files':>6}{'characters':>13}{'>= 100K':>9}{'longest':>10}")
    folders: dict[str, list[int]] = {}
    for file in manifest["files"]:
        folders.setdefault(os.path.dirname(file["path"]), []).append(file["chars"])
    for folder, sizes in folders.items():
        long = sum(size >= 100_000 for size in sizes)
        print(f"{folder:<20}{len(sizes):>6}{sum(sizes):>13,}{long:>9}{max(sizes):>10,}")
    for reason in sorted({drop["reason"] for drop in manifest["dropped"]}):
        count = sum(drop["reason"] == reason for drop in manifest["dropped"])
        print(f"dropped {count} files: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/text"), help="folder to write")
    parser.add_argument("--debs", type=Path, help="folder with the .deb files")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    if args.out.exists() and not args.force:
        sys.exit(f"{args.out} is already there; --force builds it anew.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".get-text-", dir=args.out.parent) as name:
        work = Path(name)
        fresh = work / "text"
        manifest = build(unpack(args.debs, work), fresh)
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if args.out.exists():
            shutil.rmtree(args.out)
        fresh.rename(args.out)
    print_table(manifest)


if __name__ == "__main__":
    main()
