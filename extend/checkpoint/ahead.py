"""Fetch weights into the page cache while Python is busy with something else.

Importing torch takes two to five seconds, in which a disk would stand still.
"""

import contextlib
import functools
import gc
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_SPAN_BYTES = 2**24
_WINDOW_BYTES = 2**20
_LEAST_ADVICE = 2**17  # what Linux takes of one piece of advice where nobody changed that
_MEMORY_SHARE = 4  # at most one part in so many of the memory that is free


@contextlib.contextmanager
def reading_ahead(*directories: Path | str | None) -> Iterator[None]:
    """Let the system read the weights below `directories` while the block imports torch.

    They are read side by side, each from its first file on. What cannot be read is left to those
    who read it in earnest. Garbage is not collected meanwhile, and what was imported is never
    looked through: it all stays, and looking for garbage in it takes a quarter of the time.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(directories, stop), daemon=True)
    thread.start()
    try:
        with _collecting_later():
            yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def will_need(file: int, offset: int, num_bytes: int) -> None:
    """Let the system fetch a part of an open file, where it takes such advice; does not wait.

    In pieces, because Linux silently drops what goes beyond the disk's own `read_ahead_kb`.
    """
    if hasattr(os, "posix_fadvise"):
        piece, end = _advice_bytes(os.fstat(file).st_dev), offset + num_bytes
        for start in range(offset, end, piece):
            os.posix_fadvise(file, start, min(piece, end - start), os.POSIX_FADV_WILLNEED)


@functools.cache
def _advice_bytes(device: int) -> int:
    """How much of one piece of advice the system takes for a disk."""
    queue = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with contextlib.suppress(OSError, ValueError):
        return max(_LEAST_ADVICE, 1024 * int(queue.read_text()))
    return _LEAST_ADVICE


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
    """Fetch a span, two windows at a time: an import's own reads wait for no more than those."""
    with path.open("rb", buffering=0) as file:
        for start in range(offset, offset + _SPAN_BYTES, _WINDOW_BYTES):
            will_need(file.fileno(), start, _WINDOW_BYTES)
            os.pread(file.fileno(), 1, max(offset, start - 1))  # waits for the window before


def _free_bytes() -> int:
    """Memory that is free, 0 where the system does not say or takes no advice."""
    if not hasattr(os, "posix_fadvise") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
