"""Rows of answers that are known: right or wrong, and losses."""

from collections.abc import Callable, Sequence
from typing import Any

from extend.evaluate.backends.backend import AnswerScore, Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.row import DIGITS, describe_prompts
from extend.evaluate.score import mean_and_error, proportion
from extend.evaluate.tasks.task import Cell, Prompt, Task

Grade = Callable[[Frame, Sequence[Prompt], Sequence[AnswerScore]], dict[str, Any]]


def exact(backend: Backend, frame: Frame, task: Task, cells: Sequence[Cell],
          seed: int) -> list[dict[str, Any]]:
    """Share of answers of which every token is the model's first choice."""
    return _score(backend, frame, task, cells, seed, grade_answers)


def loss(backend: Backend, frame: Frame, task: Task, cells: Sequence[Cell],
         seed: int) -> list[dict[str, Any]]:
    """Mean loss over windows, each scored on its own."""
    return _score(backend, frame, task, cells, seed, _loss)


def _score(backend: Backend, frame: Frame, task: Task, cells: Sequence[Cell], seed: int,
           grade: Grade) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        prompts = task.prompts(frame, cell, seed)
        rows.append({**describe_prompts(cell, prompts, seed),
                     **grade(frame, prompts, backend.score(prompts))})
    return rows


def grade_answers(frame: Frame, prompts: Sequence[Prompt],
                  scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """The score of a cell, and its trials."""
    correct = sum(score.correct for score in scores)
    tokens = sum(prompt.answer_len for prompt in prompts)
    trials = [{"correct": score.correct, **prompt.details,
               "predicted": frame.tokenizer.decode(score.predicted), **score.details}
              for prompt, score in zip(prompts, scores, strict=True)]
    return {**proportion(correct, len(prompts)), "correct": correct,
            "answer_loss": _answer_loss(scores, tokens), "trials": trials}


def _answer_loss(scores: Sequence[AnswerScore], tokens: int) -> float | None:
    losses = [score.nll for score in scores]
    return None if None in losses else round(sum(losses) / tokens, DIGITS)


def _loss(_: Frame, prompts: Sequence[Prompt],
          scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """Windows are equally long, so the mean of their means is the mean over tokens."""
    mean, error = mean_and_error([score.nll / prompt.answer_len
                                  for prompt, score in zip(prompts, scores, strict=True)])
    return {"length": len(prompts[0].ids), "loss": round(mean, DIGITS),
            "stderr": None if error is None else round(error, DIGITS), "score": None,
            "n": len(prompts), "tokens": sum(prompt.answer_len for prompt in prompts)}
