"""Means, intervals and paired differences of measured settings on one half of the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from extend.search.data import SplitData
from extend.search.front import Bootstrap, on_front, widen
from extend.search.lab import AXES, Result

_FRONT_DRAWS = 400
SHORT_KL = "short_kl"
TOLD = (*AXES, SHORT_KL)  # what has a mean and an interval


def needle_bootstrap(data: SplitData, length: int, seed: int = 0) -> Bootstrap:
    """Resamples rows within text and within filler, then the facts of each row."""
    rows = data.rows(length)
    clusters = [i for i, row in enumerate(rows) for _ in row.answers]
    return Bootstrap(clusters, [rows[i].source for i in clusters], seed=seed)


class Statistics:
    """Paired resamples of every axis.

    Args:
        example: any result on that half; all have the same items.

    Attributes:
        clusters: how many rows or windows stand behind each interval; of siblings, the fewest.
    """

    def __init__(self, data: SplitData, length: int, example: Result):
        self.length = length
        self._needle = needle_bootstrap(data, length)
        self._short = Bootstrap.of_items(len(example.short_loss), seed=1)
        self._siblings = {name: Bootstrap.of_items(len(values), seed=2 + i)
                          for i, (name, values) in enumerate(example.siblings.items())}
        fewest = min(self._siblings.values(), key=lambda bootstrap: bootstrap.num_clusters)
        behind = (self._needle, self._short, fewest, self._short)
        self._widening = np.array([bootstrap.widening for bootstrap in behind])
        self.clusters = {name: bootstrap.num_clusters for name, bootstrap in zip(TOLD, behind)}

    def draws(self, result: Result) -> np.ndarray:
        """Resampled points, fp64 [draws, 3]; resample i is the same for every result."""
        siblings = [self._siblings[name].means(values)
                    for name, values in result.siblings.items()]
        return np.stack([self._needle.means(result.needle[self.length]),
                         self._short.means(result.short_loss), np.mean(siblings, axis=0)], axis=1)

    def describe(self, result: Result) -> dict[str, Any]:
        """Mean and 95 % interval of each axis and of KL(native || setting) on short text."""
        told = self._tell(self._point(result), self._all_draws(result))
        told["by_sibling"] = {n: float(np.mean(v)) for n, v in result.siblings.items()}
        return told

    def difference(self, result: Result, other: Result) -> dict[str, Any]:
        """result - other, with paired 95 % intervals; below 0 is better."""
        return self._tell(self._point(result) - self._point(other),
                          self._all_draws(result) - self._all_draws(other))

    def _point(self, result: Result) -> np.ndarray:
        return np.append(result.point(self.length), np.mean(result.short_kl))

    def _all_draws(self, result: Result) -> np.ndarray:
        return np.column_stack([self.draws(result), self._short.means(result.short_kl)])

    def _tell(self, point: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        """Means [4] and draws [n, 4], in the order of `TOLD`, as JSON."""
        low, high = widen(draws, point, self._widening)
        return {name: {"mean": float(point[i]), "low": float(low[i]), "high": float(high[i])}
                for i, name in enumerate(TOLD)}

    def front(self, results: Sequence[Result], axes: Sequence[int]) -> tuple[list[bool],
                                                                             list[float]]:
        """Which results are on the front of these axes, and in what share of the resamples."""
        points = np.array([r.point(self.length) for r in results])[:, axes]
        draws = np.stack([self.draws(r)[:_FRONT_DRAWS] for r in results], axis=1)[:, :, axes]
        shares = np.mean([on_front(draw) for draw in draws], axis=0)
        return on_front(points).tolist(), shares.tolist()

