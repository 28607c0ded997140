"""A whole grid from one prefill a trial: a row is read once, and asked at every length."""

from collections.abc import Sequence
from typing import Any

from extend.errors import CompatibilityError
from extend.evaluate.backends.backend import AnswerScore, Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.answers import exact, grade_answers
from extend.evaluate.measures.row import describe_prompts
from extend.evaluate.tasks.passkey_stream import SINGLE, PasskeyStream, Question, Stream
from extend.evaluate.tasks.task import Cell, Prompt

Answers = list[tuple[Stream, Question, AnswerScore]]
_NEEDS = ("new_cache", "hidden_parts", "score_after")


def stream(backend: Backend, frame: Frame, task: PasskeyStream, cells: Sequence[Cell],
           seed: int) -> list[dict[str, Any]]:
    """Rows of a grid, of its control, and of cells that are asked once more alone.

    `answer` by `answer` the scores are those of a forward of all that precedes a question and of
    the question, as `task.prompts` builds it.

    Raises:
        CompatibilityError: a backend that keeps no cache to ask after, or a model whose cache is
            of another kind.
    """
    _refuse_backend(backend)
    found: dict[Cell, Answers] = {}
    for control in dict.fromkeys(cell.control for cell in cells if cell.control != SINGLE):
        first = next(cell for cell in cells if cell.control == control)
        for trial in range(first.trials):
            row = task.stream(frame, first, seed, trial)
            for question, score in zip(row.questions, _ask(backend, row), strict=True):
                found.setdefault(question.cell, []).append((row, question, score))
    rows = {cell: _row(frame, cell, answers, seed) for cell, answers in found.items()}
    for cell in cells:
        if cell.control == SINGLE:
            (alone,) = exact(backend, frame, task, [cell], seed)
            rows[cell] = {**alone, **_agreement(alone, rows, cell)}
    return [rows[cell] for cell in cells]


def _refuse_backend(backend: Backend) -> None:
    if not all(hasattr(backend, name) for name in _NEEDS):
        raise CompatibilityError(f"backend {backend.name!r} keeps no cache that questions can be "
                                 "asked after, which passkey-stream needs; use the backend "
                                 "'local', or the task passkey")


def _ask(backend: Any, row: Stream) -> list[AnswerScore]:
    """Scores of a row's questions, in their order."""
    cache, read, scores = backend.new_cache(len(row.ids)), 0, {}
    for begin in sorted({question.begin for question in row.questions}):
        for _ in backend.hidden_parts(row.ids[read:begin], cache):
            pass
        read = begin
        here = [i for i, question in enumerate(row.questions) if question.begin == begin]
        asked = [Prompt(row.questions[i].ids, row.questions[i].answer_len) for i in here]
        scores.update(zip(here, backend.score_after(cache, asked), strict=True))
    return [scores[i] for i in range(len(row.questions))]


def _row(frame: Frame, cell: Cell, answers: Answers, seed: int) -> dict[str, Any]:
    prompts = [row.prompt(question) for row, question, _ in answers]
    views = [question.details.get("facts_in_view", 0) for _, question, _ in answers]
    return {**describe_prompts(cell, prompts, seed),
            **grade_answers(frame, prompts, [score for _, _, score in answers]),
            "facts_in_view": max(views)}


def _agreement(alone: dict[str, Any], rows: dict[Cell, dict[str, Any]],
               cell: Cell) -> dict[str, Any]:
    """How many trials come out the same with all facts in view and with one."""
    same = next(row for other, row in rows.items() if other.control is None
                and (other.length, other.depth) == (cell.length, cell.depth))
    pairs = zip(alone["trials"], same["trials"], strict=True)
    return {"facts_in_view": 1, "stream_score": same["score"],
            "agreeing": sum(one["correct"] == other["correct"] for one, other in pairs)}
