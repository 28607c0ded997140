"""Does a loss rise with the position, beyond what the noise of the text would give?"""

import math
from dataclasses import dataclass

import numpy as np

from extend.evaluate.score import mean_and_error

BLOCK = 512  # tokens whose losses are taken as one: losses close by depend on each other
_NOTHING = 1e-6  # a slope below what is left of fp32 losses
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Trend:
    """A slope with its standard error.

    Attributes:
        slope: change of y for one more of x.
        stderr: None when there is too little to tell it from.
        degrees: of freedom of `stderr`.
    """

    slope: float
    stderr: float | None
    degrees: int

    @property
    def direction(self) -> str:
        """`rises`, `falls` or `flat` at 95 %, or `unknown`."""
        if self.stderr is None:
            return "unknown"
        if abs(self.slope) <= t_quantile(self.degrees) * self.stderr + _NOTHING:
            return "flat"
        return "rises" if self.slope > 0 else "falls"


def fit_trend(x: np.ndarray, y: np.ndarray) -> Trend:
    """Fit a line to all windows by least squares.

    The error of several windows comes from how their own slopes differ, that of a single one from
    blocks of BLOCK tokens, each taken as one observation (cluster-robust). The latter does not
    know that the text itself may get harder or easier along a window.

    Args:
        x: [m], the same for all windows.
        y: losses [windows, m].

    Source: Liang & Zeger 1986, doi:10.1093/biomet/73.1.13, for the blocks.
    """
    centred = x - x.mean()
    spread = float(centred @ centred)
    if not spread:
        return Trend(0.0, None, 0)
    slopes = y @ centred / spread
    if len(y) > 1:
        return Trend(*mean_and_error(slopes.tolist()), len(y) - 1)
    rest = y[0] - y[0].mean() - slopes[0] * centred
    parts = _blocks(len(x))
    if len(parts) < 3:  # a line through two points leaves no rest
        return Trend(float(slopes[0]), None, 0)
    pulls = np.add.reduceat(centred * rest, parts) / spread
    degrees = len(parts) - 2
    return Trend(float(slopes[0]), math.sqrt(len(parts) / degrees * float(pulls @ pulls)), degrees)


def mean_of_windows(y: np.ndarray) -> tuple[float, float | None]:
    """The mean loss of windows [windows, m] and its standard error, from blocks if there is one."""
    if len(y) > 1:
        return mean_and_error(y.mean(axis=1).tolist())
    parts = _blocks(y.shape[1])
    lengths = np.diff([*parts, y.shape[1]])
    mean = float(y[0].mean())
    if len(parts) < 2:
        return mean, None
    pulls = (np.add.reduceat(y[0], parts) - mean * lengths) / y.shape[1]
    return mean, math.sqrt(len(parts) / (len(parts) - 1) * float(pulls @ pulls))


def _blocks(length: int) -> np.ndarray:
    """Where whole blocks begin; what is left over belongs to the last."""
    return np.arange(max(1, length // BLOCK)) * BLOCK


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to three digits or better.

    Source: Abramowitz & Stegun 1964, 26.7.5; closed forms for one and two degrees.
    """
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95 ** 2))
    z, n = _Z, degrees
    terms = ((z ** 3 + z) / 4, (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96,
             (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384,
             (79 * z ** 9 + 776 * z ** 7 + 1482 * z ** 5 - 1920 * z ** 3 - 945 * z) / 92160)
    return z + sum(term / n ** k for k, term in enumerate(terms, start=1))
