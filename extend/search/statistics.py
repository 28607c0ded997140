"""Means, intervals and paired differences of measured settings on one half of the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from extend.search.data import SplitData
from extend.search.front import Bootstrap, on_front
from extend.search.lab import AXES, Result

_FRONT_DRAWS = 400


def needle_bootstrap(data: SplitData, length: int, seed: int = 0) -> Bootstrap:
    """Resamples rows within text and within filler, then the facts of each row."""
    rows = data.rows(length)
    clusters = [i for i, row in enumerate(rows) for _ in row.answers]
    return Bootstrap(clusters, [rows[i].source for i in clusters], seed=seed)


class Statistics:
    """Paired resamples of every axis.

    Args:
        example: any result on that half; all have the same items.
    """

    def __init__(self, data: SplitData, length: int, example: Result):
        self.length = length
        self._needle = needle_bootstrap(data, length)
        self._short = Bootstrap.of_items(len(example.short_loss), seed=1)
        self._siblings = {name: Bootstrap.of_items(len(values), seed=2 + i)
                          for i, (name, values) in enumerate(example.siblings.items())}

    def draws(self, result: Result) -> np.ndarray:
        """Resampled points, fp64 [draws, 3]; resample i is the same for every result."""
        siblings = [self._siblings[name].means(values)
                    for name, values in result.siblings.items()]
        return np.stack([self._needle.means(result.needle[self.length]),
                         self._short.means(result.short_loss), np.mean(siblings, axis=0)], axis=1)

    def describe(self, result: Result) -> dict[str, Any]:
        """Mean and 95 % interval of each axis, and KL(native || setting) on short text."""
        point, interval = result.point(self.length), _interval(self.draws(result))
        told: dict[str, Any] = {axis: {"mean": float(point[i]), "low": interval[0][i],
                                       "high": interval[1][i]} for i, axis in enumerate(AXES)}
        told["short_kl"] = float(np.mean(result.short_kl))
        told["by_sibling"] = {n: float(np.mean(v)) for n, v in result.siblings.items()}
        return told

    def difference(self, result: Result, other: Result) -> dict[str, Any]:
        """result - other on each axis, with paired 95 % intervals; below 0 is better."""
        point = result.point(self.length) - other.point(self.length)
        low, high = _interval(self.draws(result) - self.draws(other))
        return {axis: {"mean": float(point[i]), "low": low[i], "high": high[i]}
                for i, axis in enumerate(AXES)}

    def front(self, results: Sequence[Result], axes: Sequence[int]) -> tuple[list[bool],
                                                                             list[float]]:
        """Which results are on the front of these axes, and in what share of the resamples."""
        points = np.array([r.point(self.length) for r in results])[:, axes]
        draws = np.stack([self.draws(r)[:_FRONT_DRAWS] for r in results], axis=1)[:, :, axes]
        shares = np.mean([on_front(draw) for draw in draws], axis=0)
        return on_front(points).tolist(), shares.tolist()


def _interval(draws: np.ndarray) -> tuple[list[float], list[float]]:
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()
