"""Pareto fronts, and confidence intervals from a paired bootstrap."""

from collections.abc import Sequence

import numpy as np


def on_front(points: np.ndarray) -> np.ndarray:
    """Which rows no other row dominates, bool [n], for points [n, axes]; less is better.

    A row dominates another when it is nowhere larger and somewhere smaller; equal rows both stay.
    """
    lower = (points[:, None, :] <= points[None, :, :]).all(-1)
    strictly = (points[:, None, :] < points[None, :, :]).any(-1)
    return ~(lower & strictly).any(0)


class Bootstrap:
    """The same resamples for every candidate, so that differences are paired.

    Items of a cluster (facts of one row) share what surrounds them. Clusters are drawn with
    replacement inside their stratum, then items inside each drawn cluster.

    Args:
        clusters: of each item.
        strata: of each item; a cluster lies in one stratum.
        draws: how many resamples.

    Source: the two-stage bootstrap of Davison & Hinkley 1997, section 3.8.
    """

    def __init__(self, clusters: Sequence[object], strata: Sequence[object], *, draws: int = 2000,
                 seed: int = 0):
        rng = np.random.default_rng(seed)
        counts = np.zeros((draws, len(clusters)))
        for stratum in dict.fromkeys(strata):
            groups: dict[object, list[int]] = {}
            for i, (cluster, own) in enumerate(zip(clusters, strata, strict=True)):
                if own == stratum:
                    groups.setdefault(cluster, []).append(i)
            drawn = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=draws)
            for column, members in enumerate(groups.values()):
                size = len(members)
                counts[:, members] = rng.multinomial(drawn[:, column] * size, [1 / size] * size)
        self._weights = counts / counts.sum(1, keepdims=True)

    @classmethod
    def of_items(cls, count: int, *, draws: int = 2000, seed: int = 0) -> "Bootstrap":
        """Every item a cluster of its own."""
        return cls(range(count), [0] * count, draws=draws, seed=seed)

    def means(self, values: Sequence[float]) -> np.ndarray:
        """The mean of each resample, fp64 [draws]."""
        return self._weights @ np.asarray(values, dtype=np.float64)

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """The 95 % percentile interval of the mean; of a difference, when given differences."""
        low, high = np.percentile(self.means(values), [2.5, 97.5])
        return float(low), float(high)
