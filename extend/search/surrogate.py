"""A Gaussian process that guesses a setting's value from those measured, to choose what to try."""

from dataclasses import dataclass

import numpy as np

_SCALES = (0.15, 0.3, 0.6, 1.2, 2.4)  # of the median distance
_NOISES = (1e-4, 1e-2, 1e-1)  # share of the variance


@dataclass(frozen=True, slots=True)
class GaussianProcess:
    """A fitted process with a squared-exponential kernel.

    Source: Rasmussen & Williams 2006, algorithm 2.1; kernel width and noise by the marginal
    likelihood over a small grid.
    """

    x: np.ndarray
    weights: np.ndarray
    factor: np.ndarray
    scale: float
    offset: float
    spread: float

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at points [n, features], each fp64 [n]."""
        cross = _kernel(x, self.x, self.scale)
        mean = cross @ self.weights
        inner = np.linalg.solve(self.factor, cross.T)
        variance = np.maximum(1 - (inner ** 2).sum(0), 1e-12)
        return self.offset + self.spread * mean, self.spread * np.sqrt(variance)


def fit(x: np.ndarray, y: np.ndarray) -> GaussianProcess:
    """Fit values [n] at points [n, features]."""
    offset, spread = float(y.mean()), float(y.std()) or 1.0
    target = (y - offset) / spread
    distances = _distances(x, x)
    typical = float(np.sqrt(np.median(distances[distances > 0]))) if (distances > 0).any() else 1.0
    best: tuple[float, GaussianProcess] | None = None
    for scale in _SCALES:
        kernel = np.exp(-distances / (2 * (scale * typical) ** 2))
        for noise in _NOISES:
            factor = np.linalg.cholesky(kernel + (noise + 1e-8) * np.eye(len(x)))
            weights = np.linalg.solve(factor.T, np.linalg.solve(factor, target))
            evidence = -0.5 * float(target @ weights) - float(np.log(np.diag(factor)).sum())
            if best is None or evidence > best[0]:
                best = evidence, GaussianProcess(x, weights, factor, scale * typical, offset,
                                                 spread)
    assert best is not None
    return best[1]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [n, m]."""
    squares = (a ** 2).sum(1)[:, None] + (b ** 2).sum(1)[None, :] - 2 * a @ b.T
    return np.maximum(squares, 0.0)


def _kernel(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    return np.exp(-_distances(a, b) / (2 * scale ** 2))
