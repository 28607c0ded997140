"""Losses of text that is read through a sliding window."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from extend.evaluate.backends.backend import Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.capability import require
from extend.evaluate.measures.row import DIGITS, describe_prompts
from extend.evaluate.score import mean_and_error
from extend.evaluate.tasks.long_text import SlidingPerplexity
from extend.evaluate.tasks.task import Cell

_GROUP = 2 ** 20  # tokens of windows that exist at once


def sliding(backend: Backend, frame: Frame, task: SlidingPerplexity, cells: Sequence[Cell],
            seed: int) -> list[dict[str, Any]]:
    """Perplexity of stretches of text; every scored token counts alike.

    `unweighted_perplexity` is the mean over windows, of which the first has more tokens than the
    others: yarn's published script takes it.
    """
    rows = []
    for cell in cells:
        local = require(backend, cell, "token_losses")
        stretches = task.prompts(frame, cell, seed)
        losses = [sliding_losses(local, stretch.ids, len(frame.prefix), window=cell.length,
                                 stride=task.stride) for stretch in stretches]
        means = [float(part.mean()) for each in losses for part in each]
        loss, error = mean_and_error([float(np.concatenate(each).mean()) for each in losses])
        rows.append({
            **describe_prompts(cell, stretches, seed), "actual_length": cell.length,
            "loss": round(loss, DIGITS), "stderr": None if error is None else round(error, DIGITS),
            "score": None, "n": len(losses), "tokens": sum(p.size for each in losses for p in each),
            "perplexity": round(math.exp(loss), DIGITS),
            "unweighted_perplexity": round(math.exp(math.fsum(means) / len(means)), DIGITS),
            "windows": len(means), "stride": task.stride, "span": len(stretches[0].ids),
            "joined": task.join})
    return rows


def sliding_losses(backend: Any, ids: Sequence[int], prefix_len: int, *, window: int,
                   stride: int) -> list[np.ndarray]:
    """Losses of a text's tokens, each read in the first window that holds it.

    A token has between `window - stride` and `window` tokens before it, in the first window fewer.

    Args:
        backend: with `token_losses`.
        ids: special tokens, which every window begins with, and the text.
        prefix_len: how many special tokens.
        window: tokens of a window, special tokens included.

    Returns:
        Of each window the losses that it adds, fp64, in the order of the text. Without special
        tokens the first token of the text has none.
    """
    prefix, text = list(ids[:prefix_len]), np.asarray(ids[prefix_len:], dtype=np.int64)
    rows: list[np.ndarray] = []
    last: list[int] = []
    found: list[np.ndarray] = []
    for begin, end, new in slide(len(text), window - prefix_len, stride):
        rows.append(np.concatenate([np.asarray(prefix, dtype=np.int64), text[begin:end]]))
        last.append(min(new, len(rows[-1]) - 1))  # without special tokens, not the very first
        if len(rows) * window >= _GROUP or end == len(text):
            found += backend.token_losses(rows, last)
            rows, last = [], []
    return [part.astype(np.float64) for part in found]


def slide(total: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, tokens that no window before it held) of each window over `total` tokens."""
    seen = 0
    for begin in range(0, total, stride):
        end = min(begin + size, total)
        yield begin, end, end - seen
        seen = end
        if end == total:
            return
