"""A reader that looks at everything a run has published, over and over, and is never satisfied.

Published is what has its final name: no part of its path below the watched directory begins with a
dot, and it lies in no `.state` of a training, whose only promise is to the run itself.

    problems, count = look(out)        # once; [] when everything is whole
"""

import json
import os
import struct
import time
from pathlib import Path
from typing import BinaryIO

MANIFEST = "manifest.json"
_PNG_END = b"IEND\xaeB`\x82"


def look(out: Path) -> tuple[list[str], int]:
    """What is partial below `out`, and how many files were read."""
    problems, count = [], 0
    for directory in _published(out):
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it was replaced
        try:
            found, read = _look_into(handle, directory)
        except OSError as error:
            # Files go with a directory that has lost its name; with its name, one was missing.
            found, read = ([f"{directory}: {error}"] if _has_its_name(handle, directory) else [], 0)
        finally:
            os.close(handle)
        problems += found
        count += read
    return problems, count


def watch(out: Path, stop: Path, record: Path) -> None:
    """Look until the file `stop` is there; then leave what was seen in `record`, as JSON."""
    problems, looks, reads = [], 0, 0
    while not stop.exists():
        found, count = look(out)
        problems += found[:100 - len(problems)]
        looks, reads = looks + 1, reads + count
        time.sleep(0.002)
    record.write_text(json.dumps({"looks": looks, "files": reads, "problems": problems}))


def _published(out: Path) -> list[Path]:
    """`out` itself and the directories in it that have a final name."""
    try:
        with os.scandir(out) as entries:
            inner = [Path(e.path) for e in entries if not e.name.startswith(".")
                     and not e.name.endswith(".state") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [out, *sorted(inner)]


def _has_its_name(handle: int, directory: Path) -> bool:
    try:
        now = os.stat(directory)
    except OSError:
        return False
    mine = os.fstat(handle)
    return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)


def _look_into(handle: int, directory: Path) -> tuple[list[str], int]:
    """Read every file by way of the open directory, so that all are of one and the same."""
    problems, count = [], 0
    sizes = {}
    for name in os.listdir(handle):
        if name.startswith(".") or name.endswith(".state"):
            continue
        path = directory / name
        try:
            with open(name, "rb", opener=lambda n, flags: os.open(n, flags, dir_fd=handle)) as file:
                problem = problem_of(path, file)
                sizes[name] = os.fstat(file.fileno()).st_size
        except IsADirectoryError:
            continue
        count += 1
        if problem:
            problems.append(f"{path}: {problem}")
    if MANIFEST in sizes:
        with open(MANIFEST, "rb",
                  opener=lambda n, flags: os.open(n, flags, dir_fd=handle)) as file:
            outputs = json.load(file)["outputs"]
        for name, entry in outputs.items():
            have = os.stat(name, dir_fd=handle).st_size
            if have != entry["bytes"]:
                problems.append(f"{directory / name}: {have} bytes, manifest {entry['bytes']}")
    return problems, count


def problem_of(path: Path, file: BinaryIO) -> str | None:
    """Why a file is not whole; None when it is."""
    data = file.read()
    try:
        match path.suffix:
            case ".json":
                json.loads(data)
            case ".jsonl":
                if not data.endswith(b"\n"):
                    return "its last line is cut"
                for line in data.splitlines():
                    json.loads(line)
            case ".safetensors":
                return _header_problem(data)
            case ".html" if not data.rstrip().endswith(b"</html>"):
                return "it does not end with </html>"
            case ".png" if not data.endswith(_PNG_END):
                return "it does not end with IEND"
            case _ if not data and path.suffix not in (".html", ".png"):
                return "it is empty"
    except ValueError as error:
        return f"not JSON ({error})"
    return None


def _header_problem(data: bytes) -> str | None:
    if len(data) < 8:
        return f"{len(data)} bytes are no header"
    [length] = struct.unpack("<Q", data[:8])
    if 8 + length > len(data):
        return f"a header of {length} bytes in a file of {len(data)}"
    header = json.loads(data[8:8 + length])
    end = max((entry["data_offsets"][1] for name, entry in header.items()
               if name != "__metadata__"), default=0)
    return None if 8 + length + end == len(data) else (
        f"{len(data)} bytes, but its header speaks of {8 + length + end}")
