"""How long it takes to build one long prompt of each task."""

import dataclasses
import random
import signal
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extend.errors import ExtendError
from extend.evaluate.tasks import TASKS

WORDS = ("stone", "river", "lamp", "quiet", "under", "seven", "walk", "green", "door", "wind",
         "the", "a", "of", "and", "to", "light", "house", "field", "long", "before")
_CHARS_A_TOKEN = 8  # more than there are in the text below, so that it is enough


class TooLong(Exception):
    """A task's prompt takes longer than it may."""


def time_prompts(bench: Any) -> dict[str, Any]:
    """Seconds of one prompt of each task on a grid, or why there is none."""
    options = bench.options
    with tempfile.TemporaryDirectory() as directory:
        text = options.text or write_text(Path(directory) / "text.txt", options.prefill)
        found = {}
        for label, kind, given in cases(text):
            found[label] = time_task(bench, kind, given, options)
    return {"tokens": options.prefill, "tasks": found}


def cases(text: Path) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """(label, task, options); a task that takes text or not is built both ways."""
    for name, kind in TASKS.items():
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        needed = {key for key, f in fields.items()
                  if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
        given = {"haystack": str(text)} if "haystack" in needed else {}
        yield name, kind, given
        if "haystack" in fields and not given and not needed:
            yield f"{name} (text)", kind, {"haystack": str(text)}


def time_task(bench: Any, kind: Any, given: dict[str, str], options: Namespace) -> dict[str, Any]:
    if not kind.on_grid:
        return {"left_out": "has no lengths"}
    try:
        with at_most(options.prompt_seconds):
            start, worked = time.perf_counter(), time.process_time()
            task = kind(**given)
            cells = task.cells("bench", [options.prefill], [0.5], 1)
            prompt = task.prompts(bench.frame, cells[0], options.seed)[0]
            seconds, worked = time.perf_counter() - start, time.process_time() - worked
    except (ExtendError, TypeError) as error:
        return {"left_out": str(error)[:200]}
    except TooLong:
        return {"left_out": f"not built after {options.prompt_seconds:g} s"}
    return {"seconds": round(seconds, 3), "cpu_seconds": round(worked, 3),
            "tokens": len(prompt.ids) + prompt.max_new_tokens}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooLong when the block takes longer; in the main thread only."""
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_text(path: Path, tokens: int) -> Path:
    """Lines of words, enough for passages of so many tokens."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < tokens * _CHARS_A_TOKEN:
            line = " ".join(rng.choices(WORDS, k=rng.randrange(4, 16))) + ".\n"
            file.write(line)
            written += len(line)
    return path
