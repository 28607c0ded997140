#!/usr/bin/env python3
"""The floors: read directories, or copy one, with plain calls and large buffers.

    plain_io.py read THREADS DIR...
    plain_io.py copy THREADS DIR OUT
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUFFER_BYTES = 2**24


def read(path: Path) -> int:
    buffer, total = bytearray(BUFFER_BYTES), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def copy(path: Path, out: Path) -> int:
    buffer, total = memoryview(bytearray(BUFFER_BYTES)), 0
    with path.open("rb", buffering=0) as file, out.open("wb", buffering=0) as copied:
        while count := file.readinto(buffer):
            copied.write(buffer[:count])
            total += count
        os.fsync(copied.fileno())
    return total


def main(kind: str, threads: str, *paths: str) -> None:
    with ThreadPoolExecutor(int(threads)) as pool:
        if kind == "read":
            files = [file for path in paths for file in sorted(Path(path).glob("*.safetensors"))]
            total = sum(pool.map(read, files))
        else:
            source, out = Path(paths[0]), Path(paths[1])
            out.mkdir(parents=True)
            total = sum(pool.map(lambda file: copy(file, out / file.name),
                                 sorted(source.glob("*"))))
    print(total)


if __name__ == "__main__":
    main(*sys.argv[1:])
