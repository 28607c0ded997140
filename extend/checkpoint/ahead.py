"""Fetch weights into the page cache while Python is busy with something else.

Importing torch takes two to five seconds, in which a disk would stand still.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_SPAN_BYTES = 2**24
_MEMORY_SHARE = 4  # at most one part in so many of the memory that is free


@contextlib.contextmanager
def reading_ahead(*directories: Path | str | None) -> Iterator[None]:
    """Let the system read the weights below `directories` for as long as the block runs.

    They are read side by side, each from its first file on. What cannot be read is left to those
    who read it in earnest.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(directories, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read(directories: tuple[Path | str | None, ...], stop: threading.Event) -> None:
    files = [sorted(Path(path).glob("*.safetensors")) for path in directories if path is not None]
    limit = _free_bytes() // _MEMORY_SHARE
    with contextlib.suppress(OSError):
        for number, group in enumerate(zip(*map(_spans, files), strict=False)):
            if stop.is_set() or (number + 1) * len(files) * _SPAN_BYTES > limit:
                return
            for path, offset in group:
                _fetch(path, offset)


def _spans(files: list[Path]) -> Iterator[tuple[Path, int]]:
    return itertools.chain.from_iterable(
        ((path, offset) for offset in range(0, path.stat().st_size, _SPAN_BYTES)) for path in files)


def _fetch(path: Path, offset: int) -> None:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), offset, _SPAN_BYTES, os.POSIX_FADV_WILLNEED)


def _free_bytes() -> int:
    """Memory that is free, 0 where the system does not say or takes no advice."""
    if not hasattr(os, "posix_fadvise") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
