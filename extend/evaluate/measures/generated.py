"""Rows of answers that the model writes and the task grades."""

from collections.abc import Sequence
from typing import Any

from extend.evaluate.backends.backend import Backend, Generation
from extend.evaluate.frame import Frame
from extend.evaluate.measures.row import describe_prompts
from extend.evaluate.score import proportion
from extend.evaluate.tasks.task import Cell, Prompt, Task


def generated(backend: Backend, frame: Frame, task: Task, cells: Sequence[Cell],
              seed: int) -> list[dict[str, Any]]:
    """Mean grade of what the model writes.

    Grades lie between 0 and 1, and no such distribution varies more than right and wrong answers
    of the same mean: the Wilson interval of the mean is on the safe side.
    """
    rows = []
    for cell in cells:
        prompts = task.prompts(frame, cell, seed)
        written = backend.generate(prompts)
        grades = [task.grade(g.text, p) for g, p in zip(written, prompts, strict=True)]
        rows.append({**describe_prompts(cell, prompts, seed), **_graded(prompts, written, grades)})
    return rows


def _graded(prompts: Sequence[Prompt], written: Sequence[Generation],
            grades: Sequence[float]) -> dict[str, Any]:
    n = len(prompts)
    trials = [{"grade": round(grade, 6), **prompt.details, "predicted": generation.text,
               "finished": generation.finished, "tokens": len(generation.ids),
               **generation.details}
              for prompt, generation, grade in zip(prompts, written, grades, strict=True)]
    return {**proportion(sum(grades), n), "correct": sum(grade == 1 for grade in grades),
            "truncated": round(sum(not g.finished for g in written) / n, 6),
            "empty": round(sum(not g.text.strip() for g in written) / n, 6), "trials": trials}
