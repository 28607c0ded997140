"""Pareto fronts, and confidence intervals from a paired bootstrap."""

import math
from collections.abc import Sequence

import numpy as np

_NORMAL = 1.959964  # 97.5 % quantile


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

    Resamples of n clusters spread by sqrt((n - 1) / n) too little, so their distance from the mean
    is stretched by the inverse, stratum by stratum. A stratum of one cluster cannot be.

    Args:
        clusters: of each item.
        strata: of each item; a cluster lies in one stratum.
        draws: how many resamples.

    Attributes:
        num_clusters: over all strata.
        widening: what an interval is stretched by further, because few clusters tell their own
            spread badly: the 97.5 % quantile of Student's t with num_clusters - strata degrees of
            freedom (at least 1) over that of the normal distribution.

    Source: the two-stage bootstrap of Davison & Hinkley 1997, section 3.8; the stretching follows
    Hesterberg 2015, doi:10.1080/00031305.2015.1089789, section 3.2.
    """

    def __init__(self, clusters: Sequence[object], strata: Sequence[object], *, draws: int = 2000,
                 seed: int = 0):
        rng = np.random.default_rng(seed)
        counts = np.zeros((draws, len(clusters)))
        stretch = np.ones(len(clusters))
        self.num_clusters = 0
        for stratum in dict.fromkeys(strata):
            groups: dict[object, list[int]] = {}
            for i, (cluster, own) in enumerate(zip(clusters, strata, strict=True)):
                if own == stratum:
                    groups.setdefault(cluster, []).append(i)
            drawn = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=draws)
            self.num_clusters += len(groups)
            for column, members in enumerate(groups.values()):
                stretch[members] = math.sqrt(len(groups) / max(1, len(groups) - 1))
                size = len(members)
                counts[:, members] = rng.multinomial(drawn[:, column] * size, [1 / size] * size)
        weights = counts / counts.sum(1, keepdims=True)
        even = 1 / len(clusters)
        self._weights = even + stretch * (weights - even)
        self.widening = student_quantile(max(1, self.num_clusters - len(set(strata)))) / _NORMAL

    @classmethod
    def of_items(cls, count: int, *, draws: int = 2000, seed: int = 0) -> "Bootstrap":
        """Every item a cluster of its own."""
        return cls(range(count), [0] * count, draws=draws, seed=seed)

    def means(self, values: Sequence[float]) -> np.ndarray:
        """The mean of each resample, fp64 [draws]."""
        return self._weights @ np.asarray(values, dtype=np.float64)

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """The widened 95 % interval of the mean; of a difference, when given differences."""
        centre = float(np.mean(values))
        low, high = widen(self.means(values), centre, self.widening)
        return float(low), float(high)


def widen(draws: np.ndarray, centre: np.ndarray | float,
          widening: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of draws [draws, ...], stretched about the centre [...]."""
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return centre + widening * (low - centre), centre + widening * (high - centre)


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.01.

    Source: closed forms for 1 and 2 degrees of freedom; Abramowitz & Stegun 26.7.5 beyond.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95 ** 2))
    z = _NORMAL
    return (z + (z ** 3 + z) / (4 * freedom)
            + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * freedom ** 3)
            + (79 * z ** 9 + 776 * z ** 7 + 1482 * z ** 5 - 1920 * z ** 3 - 945 * z)
            / (92160 * freedom ** 4))
