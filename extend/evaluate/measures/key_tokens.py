"""Rows of the loss on key tokens: those that an evaluator needs long context for."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from extend.evaluate.backends.backend import Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.capability import require
from extend.evaluate.measures.row import DIGITS, describe_prompts
from extend.evaluate.measures.sliding import sliding_losses
from extend.evaluate.tasks.long_text import SELF, KeyTokens
from extend.evaluate.tasks.task import Cell, Prompt


def key_tokens(backend: Backend, frame: Frame, task: KeyTokens, cells: Sequence[Cell],
               seed: int) -> list[dict[str, Any]]:
    """The model's mean loss on tokens that the evaluator chose; None where it chose none."""
    rows = []
    for cell in cells:
        local = require(backend, cell, "token_losses")
        prompts = task.prompts(frame, cell, seed)
        pairs = [_score(local, task, cell, prompt, len(frame.prefix)) for prompt in prompts]
        rows.append({**describe_prompts(cell, prompts, seed), "evaluator": task.evaluator,
                     "evaluator_context": task.evaluator_context(cell), "alpha": task.alpha,
                     "beta": task.beta, "short": task.short, "stride": task.stride,
                     "joined": task.join, **_describe(*zip(*pairs, strict=True))})
    return rows


def _score(backend: Any, task: KeyTokens, cell: Cell, prompt: Prompt,
           prefix_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The model's losses of a window's text, and which of its tokens are keys."""
    def losses(model: Any, window: int) -> np.ndarray:
        return np.concatenate(sliding_losses(model, prompt.ids, prefix_len, window=window,
                                             stride=task.stride))

    own = losses(backend, len(prompt.ids))
    evaluator, long = backend, own
    if task.evaluator != SELF:
        evaluator = backend.reference(task.evaluator)
        long = losses(evaluator, task.evaluator_context(cell))
    gain = losses(evaluator, task.short) - long
    return own, (gain > task.alpha) & (long < task.beta)


def _describe(losses: Sequence[np.ndarray], keys: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean and standard error of a ratio: windows have different numbers of key tokens.

    Source: Cochran 1977, Sampling Techniques, equation 6.13, without the finite population.
    """
    counts = np.array([key.sum() for key in keys])
    sums = np.array([loss[key].sum() for loss, key in zip(losses, keys, strict=True)])
    total, n = int(counts.sum()), len(keys)
    mean = float(sums.sum() / total) if total else None
    error = None
    if total and n > 1:
        rest = sums - mean * counts
        error = math.sqrt(n / (n - 1) * float(rest @ rest)) / total
    return {"loss": None if mean is None else round(mean, DIGITS),
            "stderr": None if error is None else round(error, DIGITS), "score": None, "n": n,
            "tokens": total, "key_tokens": total,
            "of_tokens": sum(map(len, keys)),
            "perplexity": None if mean is None else round(math.exp(mean), DIGITS),
            "all_loss": round(float(np.concatenate(losses).mean()), DIGITS),
            "key_sha256": _hash(keys)}


def _hash(keys: Sequence[np.ndarray]) -> str:
    """Of the places of all key tokens, window by window: equal where the same ones are scored."""
    places = [np.flatnonzero(key).tolist() for key in keys]
    return hashlib.sha256(json.dumps(places, separators=(",", ":")).encode()).hexdigest()
