"""What people see while a command runs: log records as lines, or as bars on a terminal.

    logger.info("step 3/40: loss 2.1", extra=progress(3, 40))

Records go to stderr, in one of three ways. On a terminal, those with `progress` become a bar and
all others lines above it. Where stderr is a file or a pipe, warnings are written, and beside them
at most one line a minute, so that a log of days stays readable and a short command says nothing.
With `-v`, or on a terminal that cannot move its cursor, every record is a line.

Text of files, recipes and servers may hold anything; `printable` keeps it from steering a terminal.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from extend.secrets import hide_secrets

HEARTBEAT_SECONDS = 60
_CHATTY = ("torchao", "torch.utils._pytree")
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"      # control characters but tab and new line
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what changes the order or the lines of text
    r"\ud800-\udfff]")                   # halves of characters: bytes of a path that are no text


def printable(text: str) -> str:
    """The text without secrets, and with characters that would steer a terminal, or turn the order
    of a page's text around, written as escapes, such as `\\x1b`.
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], hide_secrets(text))


def progress(done: int, total: int) -> dict[str, tuple[int, int]]:
    """The `extra` of a log record that says how far some work is."""
    return {"progress": (done, total)}


@contextmanager
def hushing_imports() -> Iterator[None]:
    """Keep quiet what torchao says of kernels that this machine lacks, while the block runs.

    transformers and PEFT import it where it is installed, whether it is used or not.
    """
    chatty = {logger: logger.level for logger in map(logging.getLogger, _CHATTY)}
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in chatty.items():
            logger.setLevel(level)


@contextmanager
def showing_logs(level: int, *, rank: int = 0) -> Iterator[None]:
    """Write the log of this process to stderr while the block runs.

    Args:
        level: of this package's records; libraries tell warnings only, and with DEBUG
            news and what they say as they are imported too.
        rank: of the process among its like; all but the first tell warnings only.
    """
    root, own = logging.getLogger(), logging.getLogger("extend")
    levels, handler = (root.level, own.level), _handler(level)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level <= logging.DEBUG else logging.WARNING)
    own.setLevel(max(level, logging.WARNING) if rank else level)
    try:
        with hushing_imports() if level > logging.DEBUG else nullcontext():
            yield
    finally:
        handler.close()
        root.removeHandler(handler)
        root.setLevel(levels[0])
        own.setLevel(levels[1])


def _handler(level: int) -> "_Lines":
    if sys.stderr.isatty() and level <= logging.INFO:
        return _Lines() if os.environ.get("TERM") in ("dumb", "unknown") else _Bars(level)
    return _Heartbeat() if level == logging.INFO else _Lines()


class _Lines(logging.StreamHandler):
    """Every record as a line on stderr as it is now, which tests and redirections replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Heartbeat(_Lines):
    """Warnings, and at most one other line a minute, after the latest that was no mere progress."""

    def __init__(self) -> None:
        super().__init__()
        self._last, self._held = time.monotonic(), None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            super().emit(record)
            return
        is_progress = hasattr(record, "progress")
        if time.monotonic() - self._last < HEARTBEAT_SECONDS:
            self._held = self._held if is_progress else record
            return
        if is_progress and self._held is not None:
            super().emit(self._held)
        self._last, self._held = time.monotonic(), None
        super().emit(record)


class _Bars(_Lines):
    """One bar at a time, for the logger that told its progress last; what else its package has to
    say stands above it.
    """

    def __init__(self, level: int) -> None:
        from rich.console import Console

        super().__init__()
        self.console = Console(stderr=True, highlight=False)
        self._verbose = level <= logging.DEBUG
        self._bars, self._owner, self._task = None, "", None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            done, total = getattr(record, "progress", (0, 0))
            if done < total:
                self._advance(record.name, done, total, self.format(record))
            elif total or _package(record.name) != _package(self._owner):
                self.stop()  # it is done, or other work has begun, perhaps in processes of its own
            if done >= total or self._verbose:
                self._print(record)
        except Exception:  # as every handler: a record that cannot be shown stops no work
            self.handleError(record)

    def _print(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.console.print(self.format(record), style=style, markup=False, soft_wrap=True)

    def _advance(self, owner: str, done: int, total: int, text: str) -> None:
        if self._bars is not None and owner == self._owner:
            self._bars.update(self._task, completed=done, total=total, description=text)
            return
        self.stop()
        self._bars, self._owner = _new_bars(self.console), owner
        self._task = self._bars.add_task(text, completed=done, total=total)
        self._bars.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def close(self) -> None:
        self.stop()
        self.console.show_cursor(True)  # which a process that was ended at once left hidden
        super().close()


def _package(logger: str) -> str:
    """`train` of `extend.train.progress`."""
    return (*logger.split("."), "")[1]


def _new_bars(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class What(ProgressColumn):
        """The record's line, cut at the width that is left."""

        def render(self, task: Any) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    return Progress(BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                    What(table_column=Column(ratio=1, no_wrap=True)), console=console,
                    transient=True, expand=True, refresh_per_second=4)
