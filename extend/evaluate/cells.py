"""Run a model on the cells of a plan and keep their rows."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extend.console import progress
from extend.evaluate.adapted import adapted_config
from extend.evaluate.backends.backend import Backend
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.frame import Frame, Template
from extend.evaluate.load import load_model
from extend.evaluate.measures import MEASURES
from extend.evaluate.plan import Unit
from extend.evaluate.rows import RowStore
from extend.evaluate.tasks.task import BASE
from extend.loading import choose_device, choose_dtype
from extend.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to score cells."""

    model: str
    adapter: str | None
    device: str
    dtype: str
    chunk: int
    seed: int
    rows: Path
    template: Template = "auto"
    thinking: int = 0
    base: str | None = None

    def open_local(self) -> LocalBackend:
        """Load the model onto the job's device.

        Raises:
            CheckpointError: damaged weights, or names that do not fit the architecture.
        """
        device = choose_device(self.device)
        return LocalBackend(
            load_model(self.model, adapter=self.adapter, device=device,
                       dtype=choose_dtype(self.dtype, device)),
            load_tokenizer(self.model), chunk=self.chunk)


def score_units(job: Job, units: Sequence[Unit], rank: int = 0) -> None:
    """Load the model once and append the rows of each unit to the store."""
    if units:
        score_with(job.open_local(), job, units, rank)


def score_with(backend: Backend, job: Job, units: Sequence[Unit], rank: int = 0) -> None:
    """Append a row to the store for each cell of the units, a unit at a time."""
    frame = Frame.of(load_tokenizer(job.model), job.template, thinking=job.thinking)
    native_len = adapted_config(job.model, job.adapter).max_position_embeddings
    store = RowStore(job.rows)
    for number, unit in enumerate(units, start=1):
        start = time.monotonic()
        rows = score_unit(backend, frame, unit, seed=job.seed, native_len=native_len,
                          base=job.base)
        for cell, row in zip(unit.cells, rows, strict=True):
            store.append(rank, cell.key, row)
            logger.info("%s (%d of %d, %.1f s)", describe(row), number, len(units),
                        time.monotonic() - start, extra=progress(number, len(units)))


def score_unit(backend: Backend, frame: Frame, unit: Unit, *, seed: int, native_len: int,
               base: str | None = None) -> list[dict[str, Any]]:
    """The rows of a unit, one a cell.

    Args:
        native_len: tokens, the model's `max_position_embeddings`.
        base: the model that cells of the control `base` are put to.
    """
    cells, of_base = unit.cells, unit.cells[0].control == BASE
    if of_base:
        backend = backend.reference(base)
        cells = [replace(cell, control=None) for cell in cells]
    rows = MEASURES[unit.task.measure](backend, frame, unit.task, cells, seed)
    return [{**row, "control": cell.control, "beyond_native": not of_base and
             row["actual_length"] > native_len}
            for cell, row in zip(unit.cells, rows, strict=True)]


def describe(row: dict[str, Any]) -> str:
    """One line for the log."""
    where = row["name"] if row["control"] is None else f"{row['name']} {row['control']}"
    if row["score"] is None:
        loss = row.get("loss")
        return f"{where}: no score" if loss is None else \
            f"{where}: loss {loss:.4f} over {row['tokens']} tokens"
    place = f" {row['actual_length']}" if row["length"] else ""
    place += f" depth {row['depth']:.2f}" if row["depth"] is not None else ""
    whole = round(row["score"] * row["n"], 3) == row["correct"]
    score = f"{row['correct']}/{row['n']}" if whole else f"mean {row['score']:.3f} of {row['n']}"
    return f"{where}{place}: {score}"
