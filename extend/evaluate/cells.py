"""Score one cell: build its prompts, run the model, make its row."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from extend.evaluate.adapted import adapted_config
from extend.evaluate.forward import AnswerScore, score_answers
from extend.evaluate.load import load_model
from extend.evaluate.plan import PlannedTask
from extend.evaluate.rows import RowStore
from extend.evaluate.score import mean_and_error, proportion
from extend.evaluate.tasks.task import Cell, Prompt, Task
from extend.loading import choose_device, choose_dtype
from extend.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
_DIGITS = 6  # of stored losses: more would differ from one number of threads to another


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


def order_cells(planned: Sequence[PlannedTask]) -> list[tuple[Task, Cell]]:
    """All cells, the longest first, so that processes that take turns end together."""
    cells = [(entry.task, cell) for entry in planned for cell in entry.cells]
    return sorted(cells, key=lambda pair: -(pair[1].length or 0))


def score_cells(job: Job, cells: Sequence[tuple[Task, Cell]], rank: int = 0) -> None:
    """Load the model once and append a row to the store for each cell."""
    if not cells:
        return
    config = adapted_config(job.model, job.adapter)
    device = choose_device(job.device)
    tokenizer = load_tokenizer(job.model)
    model = load_model(job.model, adapter=job.adapter, device=device,
                       dtype=choose_dtype(job.dtype, device))
    store = RowStore(job.rows)
    for number, (task, cell) in enumerate(cells, start=1):
        start = time.monotonic()
        row = score_cell(model, tokenizer, task, cell, seed=job.seed, chunk=job.chunk,
                         native_len=config.max_position_embeddings)
        store.append(rank, cell.key, row)
        logger.info("%s (%d of %d, %.1f s)", describe(row), number, len(cells),
                    time.monotonic() - start)


def score_cell(model: PreTrainedModel, tokenizer: Any, task: Task, cell: Cell, *, seed: int,
               chunk: int, native_len: int) -> dict[str, Any]:
    """The row of one cell.

    Args:
        native_len: tokens, the model's `max_position_embeddings`.
    """
    prompts = task.prompts(tokenizer, cell, seed)
    scores = score_answers(model, prompts, chunk=chunk)
    longest = max(len(prompt.ids) for prompt in prompts)
    row = {"task": cell.task, "name": cell.name, "length": cell.length, "actual_length": longest,
           "depth": cell.depth, "actual_depth": _mean_depth(prompts), "control": cell.control,
           "beyond_native": longest > native_len, "seed": seed, "prompt_sha256": _hash(prompts)}
    if task.measure == "loss":
        return {**row, **_loss(prompts, scores)}
    return {**row, **_exact(tokenizer, prompts, scores)}


def _exact(tokenizer: Any, prompts: Sequence[Prompt],
           scores: Sequence[AnswerScore]) -> dict[str, Any]:
    correct = sum(score.correct for score in scores)
    tokens = sum(prompt.answer_len for prompt in prompts)
    trials = [{"correct": score.correct, **prompt.details,
               "predicted": tokenizer.decode(score.predicted)}
              for prompt, score in zip(prompts, scores, strict=True)]
    return {**proportion(correct, len(prompts)), "correct": correct,
            "answer_loss": round(sum(score.nll for score in scores) / tokens, _DIGITS),
            "trials": trials}


def _loss(prompts: Sequence[Prompt], scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """Windows are equally long, so the mean of their means is the mean over tokens."""
    mean, error = mean_and_error([score.nll / prompt.answer_len
                                  for prompt, score in zip(prompts, scores, strict=True)])
    return {"length": len(prompts[0].ids), "loss": round(mean, _DIGITS),
            "stderr": None if error is None else round(error, _DIGITS), "score": None,
            "n": len(prompts), "tokens": sum(prompt.answer_len for prompt in prompts)}


def _mean_depth(prompts: Sequence[Prompt]) -> float | None:
    depths = [p.details["actual_depth"] for p in prompts if "actual_depth" in p.details]
    return round(sum(depths) / len(depths), 6) if depths else None


def _hash(prompts: Sequence[Prompt]) -> str:
    """One sha256 of all ids of the cell: the same on every machine with this tokenizer."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.ids, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def describe(row: dict[str, Any]) -> str:
    """One line for the log."""
    where = row["name"] if row["control"] is None else f"{row['name']} {row['control']}"
    if "loss" in row:
        return f"{where}: loss {row['loss']:.4f} over {row['tokens']} tokens"
    place = f" {row['actual_length']}" if row["length"] else ""
    place += f" depth {row['depth']:.2f}" if row["depth"] is not None else ""
    return f"{where}{place}: {row['correct']}/{row['n']}"
