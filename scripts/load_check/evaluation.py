"""An evaluation of many rows: kept, summed up, reported; time and memory a row, pages' sizes.

The rows are made up in the form of those that `eval` measures, and go through its own store,
summary, results, report and page of a run. Asking a model for as many is not part of it.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load_check.record import resident_bytes

if TYPE_CHECKING:
    from extend.evaluate.rows import RowStore

MOST_PAGE_BYTES = 8_000_000
"""Of one HTML file: browsers open it at once."""
MOST_RATIO = 1.5
"""Of the time, or memory, a row, between the whole and a tenth of the rows."""
TRIALS, DEPTHS = 5, 20
MODEL = {"path": "made-up", "sha256": "0" * 64, "adapter": None, "architecture": "Llama",
         "max_position_embeddings": 8192, "rope": {"rope_theta": 1e4, "scaling": None},
         "dtype": "float32", "device": "cpu"}
RUN = {"tasks": [{"task": "passkey", "name": "passkey"}], "lengths": [], "depths": DEPTHS,
       "trials": TRIALS, "base_len": None, "seed": 0, "template": "base", "thinking": 0,
       "tokenizer": {"sha256": "0" * 64}, "inputs": {}, "versions": {}}


def check(work: Path, rows: int) -> tuple[dict[str, Any], list[str]]:
    """A tenth, half and all of the rows, one after another in one process."""
    figures, failures = {}, []
    measured = {count: _measure(work / str(count), count)
                for count in (rows // 10, rows // 2, rows)}
    few, many = measured[rows // 10], measured[rows]
    for count, found in measured.items():
        figures[f"{count:,} rows"] = found
    for key in ("keep, us a row", "read back, us a row", "sum up, us a row", "report, us a row"):
        if many[key] > MOST_RATIO * few[key]:
            failures.append(f"{key}: {many[key]} of all rows, {few[key]} of a tenth of them")
    for key in ("index.html of the report, bytes", "index.html of the run, bytes"):
        if many[key] > MOST_PAGE_BYTES:
            failures.append(f"{key}: {many[key]:,}, more than {MOST_PAGE_BYTES:,}")
    if many["kept without growth, MB"] > 5:
        failures.append(f"keeping rows took {many['kept without growth, MB']} MB of memory")
    return figures, failures


def make_rows(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(cell, row) of passkeys on a grid of depths and as many lengths as that takes."""
    chance = random.Random(0)
    for number in range(count):
        length, depth = 256 + 8 * (number // DEPTHS), (number % DEPTHS) / (DEPTHS - 1)
        right = sum(chance.random() < 0.9 for _ in range(TRIALS))
        yield f"passkey/{length}/{depth}", made_row(length, depth, right)


def made_row(length: int, depth: float, right: int) -> dict[str, Any]:
    from extend.evaluate.score import proportion

    answers = [{"expected": ["12345"], "said": "12345" if i < right else "54321",
                "score": float(i < right)} for i in range(TRIALS)]
    return {"name": "passkey", "task": "passkey", "control": None, "length": length,
            "actual_length": length - 1, "depth": depth, "correct": right,
            **proportion(right, TRIALS), "answers": answers, "beyond_native": length > 8192}


def _measure(work: Path, count: int) -> dict[str, Any]:
    from extend.evaluate.report import report
    from extend.evaluate.rows import RowStore
    from extend.evaluate.summary import summarize
    from extend.output import write_json
    from extend.run_page import write_run_page

    work.mkdir(parents=True)
    store, fsync = RowStore.open(work / "rows", {"rows": count}), os.fsync
    os.fsync = lambda _: None  # the disk's time is not the program's
    try:
        before = resident_bytes(os.getpid())
        kept = _timed(lambda: _keep(store, count))
        grown = resident_bytes(os.getpid()) - before
    finally:
        os.fsync = fsync
    found, figures = {}, {"keep, us a row": _micro(kept, count),
                          "kept without growth, MB": round(grown / 1e6, 1)}
    figures["read back, us a row"] = _micro(_timed(lambda: found.update(store.read())), count)
    rows, summary = list(found.values()), {}
    figures["sum up, us a row"] = _micro(_timed(lambda: summary.update(summarize(rows, {}))), count)
    run = work / "run"
    (run / "scores").mkdir(parents=True)
    write_json(run / "scores" / "results.json", {
        "schema": 1, "model": MODEL, "run": RUN, "summary": summary, "rows": rows})
    figures["results.json, bytes a row"] = (
        run / "scores" / "results.json").stat().st_size // count
    _pretend_to_run(run)
    rows.clear()
    found.clear()
    peak = _Peak()
    figures["report, us a row"] = _micro(_timed(
        lambda: report({"made up": run / "scores"}, work / "report")), count)
    figures["page of the run, us a row"] = _micro(_timed(lambda: write_run_page(run)), count)
    figures["peak MB"] = peak.end()
    figures["index.html of the report, bytes"] = (work / "report" / "index.html").stat().st_size
    figures["report, all files, bytes"] = sum(
        f.stat().st_size for f in (work / "report").rglob("*") if f.is_file())
    figures["index.html of the run, bytes"] = (run / "index.html").stat().st_size
    return figures


def _keep(store: "RowStore", count: int) -> None:
    for key, row in make_rows(count):
        store.append(0, key, row)


def _pretend_to_run(run: Path) -> None:
    from extend.manifest import Manifest
    from extend.output import write_json
    from extend.run_record import RECIPE_RECORD, RUN_RECORD

    Manifest("eval", {}, {}, 0).write(run / "scores")
    write_json(run / RECIPE_RECORD, {
        "schema": 1, "name": "many rows", "path": "many.yaml", "sha256": "0" * 64, "text": "",
        "overrides": [], "stages": [
        {"name": "scores", "stage": "eval", "options": {}}]})
    write_json(run / RUN_RECORD, {"scores": {"state": "done", "started": "x", "found": {
        "fingerprint": None, "manifest": None}}})


def _micro(seconds: float, count: int) -> float:
    return round(seconds / count * 1e6, 1)


def _timed(work: Callable[[], object]) -> float:
    begin = time.process_time()  # of this process: what others do on the machine is not in it
    work()
    return time.process_time() - begin


class _Peak:
    """The most resident memory from now to its end, in MB."""

    def __init__(self) -> None:
        self._most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, resident_bytes(os.getpid()))

    def end(self) -> float:
        self._over.set()
        self._thread.join()
        return round(self._most / 1e6, 1)
