"""Rows of loss by position: a curve, its slope beyond the native length, and a verdict."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from extend.evaluate.backends.backend import Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.capability import require
from extend.evaluate.measures.row import DIGITS, describe_prompts
from extend.evaluate.measures.sliding import sliding_losses
from extend.evaluate.tasks.long_text import LossByPosition
from extend.evaluate.tasks.task import Cell
from extend.evaluate.trend import BLOCK, Trend, fit_trend, mean_of_windows


def positions(backend: Backend, frame: Frame, task: LossByPosition, cells: Sequence[Cell],
              seed: int) -> list[dict[str, Any]]:
    """The loss of every token by the number of tokens before it, over windows of equal length."""
    rows = []
    for cell in cells:
        local = require(backend, cell, "token_losses", "model")
        prompts = task.prompts(frame, cell, seed)
        losses = np.stack(local.token_losses([prompt.ids for prompt in prompts])).astype(np.float64)
        short = None
        if task.short is not None:
            short = np.stack([short_losses(local, prompt.ids, own, len(frame.prefix), task.short)
                              for prompt, own in zip(prompts, losses, strict=True)])
        rows.append({**describe_prompts(cell, prompts, seed), "joined": task.join,
                     "short": task.short,
                     **describe_losses(losses, short, first=task.first, bins=task.bins,
                                       native=task.native or native_length(local.model.config))})
    return rows


def short_losses(backend: Any, ids: Sequence[int], losses: np.ndarray, prefix_len: int,
                 window: int) -> np.ndarray:
    """The same tokens' losses in windows that move by half their length.

    Special tokens keep theirs.

    Args:
        ids: special tokens, then text.
        losses: [tokens - 1], in the whole row.
    """
    parts = sliding_losses(backend, ids, prefix_len, window=window, stride=window // 2)
    special = losses[:max(0, prefix_len - 1)]
    return np.concatenate([special, *parts])


def native_length(config: Any) -> int:
    """The length that a model's RoPE was made for, as far as its config tells."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def describe_losses(losses: np.ndarray, short: np.ndarray | None = None, *, first: int, bins: int,
                    native: int) -> dict[str, Any]:
    """Curve, slope and verdict.

    Args:
        losses: [windows, length - 1] of the tokens at positions 1 to length - 1, a position being
            the number of tokens before it.
        short: the same tokens' in short windows; slope and verdict are then of the difference.
        first, bins: see `LossByPosition`.
        native: positions from here on are beyond the native length.
    """
    length = losses.shape[1] + 1
    curve = [_point(losses, short, begin, end)
             for begin, end in bin_edges(length, first, bins, native)]
    mean, error = mean_of_windows(losses)
    trend, judged = None, losses if short is None else losses - short
    if length - native > 1:
        trend = fit_trend(np.log2(np.arange(native, length) / native), judged[:, native - 1:])
    known = trend is not None and trend.stderr is not None
    return {"loss": round(mean, DIGITS), "stderr": _rounded(error), "score": None,
            "n": len(losses), "tokens": losses.size,
            "stderr_from": "windows" if len(losses) > 1 else f"blocks of {BLOCK} tokens",
            "curve": curve, "native": native,
            "slope_per_doubling": round(trend.slope, DIGITS) if trend else None,
            "slope_stderr": _rounded(trend.stderr) if trend else None,
            "rises": trend.direction == "rises" if known else None,
            "verdict": _verdict(trend, native, length, len(losses), short is not None),
            **({} if short is None else _excess(losses, short, 1, length))}


def bin_edges(length: int, first: int, bins: int, native: int) -> list[tuple[int, int]]:
    """Where points of the curve begin and end: every doubling from `first` on in equal parts.

    The native length is an edge too, so that no point lies on both sides of it.
    """
    edges = {1, length, *(edge for edge in (first, native) if 1 < edge < length)}
    octave = first
    while octave < length:
        edges |= {edge for edge in (octave + octave * k // bins for k in range(bins))
                  if 1 < edge < length}
        octave *= 2
    ordered = sorted(edges)
    return list(pairwise(ordered))


def _point(losses: np.ndarray, short: np.ndarray | None, begin: int, end: int) -> dict[str, Any]:
    part = losses[:, begin - 1:end - 1]
    mean, error = mean_of_windows(part)
    return {"begin": begin, "end": end, "loss": round(mean, DIGITS), "stderr": _rounded(error),
            "tokens": part.size, **({} if short is None else _excess(losses, short, begin, end))}


def _excess(losses: np.ndarray, short: np.ndarray, begin: int, end: int) -> dict[str, Any]:
    """What tokens at some positions lose more in the whole row than in a short window."""
    part = slice(begin - 1, end - 1)
    excess, error = mean_of_windows(losses[:, part] - short[:, part])
    return {"short_loss": round(float(short[:, part].mean()), DIGITS),
            "excess": round(excess, DIGITS), "excess_stderr": _rounded(error)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _verdict(trend: Trend | None, native: int, length: int, windows: int, paired: bool) -> str:
    if trend is None:
        return f"no tokens beyond the native length of {native}: the windows have {length}"
    if trend.stderr is None:
        return f"too few tokens between {native} and {length} to tell whether the loss rises"
    words = {"rises": "rises", "falls": "still falls", "flat": "does not rise beyond noise"}
    what = "loss over that in short windows" if paired else "loss"
    text = (f"beyond {native} tokens the {what} {words[trend.direction]}: {trend.slope:+.4f} +/- "
            f"{trend.stderr:.4f} nats for each doubling")
    if windows > 1 or paired:
        return text
    return text + " (one window: harder text at its end looks the same)"
