"""What rounding alone puts into a delta: its size, and the singular values it reaches.

A checkpoint stored in 16 bits differs from the one that was trained by up to half a unit in the
last place (ulp) of each weight. Taken as independent and uniform, those errors have the variance
ulp^2 / 12. A matrix of them has no singular value above an edge: what lies above it is signal, and
rank spent below it stores the rounding.

Weights of one size have the edge sigma (sqrt m + sqrt n). Where rows or columns differ in size, so
do their ulps, and noise reaches further. With variances a_i b_j the resolvent of the noise has one
unknown for the rows, y, and one for the columns, z, which solve

    sum_i a_i / (y - a_i) = sum_j b_j / (z - b_j) = t,    s^2 = t y z

at a singular value s outside the noise; the edge is the smallest s of any t > 0. The row and column
sums of ulp^2 give a and b.

The rounding counted is that of the tuned checkpoint. The base's own is no part of the delta,
because training started from the base as it is stored.

Source: Marchenko and Pastur (1967); for one size, Geman, "A limit theorem for the norm of random
matrices" (1980); for a_i b_j, the equations of Couillet and Hachem, "Analysis of the limiting
spectral measure of large random matrices of the separable covariance type" (2014), theorem 1.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from extend.checkpoint import torch_dtype

_BLOCK = {"cpu": 2**20, "cuda": 2**24}  # elements that are looked at together
_FP32_EXPONENT = 0x7F800000
_NO_SQUARE = 2.0 ** -75  # and below: squares are zero in fp32
_GROUPS = 32  # of rows or columns, by size; each of the largest is one of its own
_SINGLE = 16
_POINTS = 24  # values of t that are tried together
_NEWTON_STEPS = 8


class Noise(NamedTuple):
    """Rounding noise of one matrix.

    Attributes:
        sigma: standard deviation of an element.
        edge: the largest singular value that the noise reaches.
        energy: the expected ||noise||_F^2.
    """

    sigma: float
    edge: float
    energy: float


def rounding_noise(base: torch.Tensor, tuned: torch.Tensor, dtype: str) -> Noise:
    """The noise of `tuned - base` when `tuned` was rounded to `dtype`.

    Args:
        base: [out, in], fp32.
        tuned: [out, in], fp32; the ulps are averaged over the values of both.
        dtype: safetensors name of the dtype that `tuned` is stored in. Differences are taken in
            fp32, so F64 counts as F32.
    """
    step = max(1, _BLOCK[base.device.type] // base.shape[1])
    sums = UlpSums(base.shape[1], dtype, base.device)
    for old, new in zip(base.split(step), tuned.split(step), strict=True):
        sums.add(old, new)
    return sums.noise()


class UlpSums:
    """Gathers `rounding_noise` block of rows by block of rows.

    Args:
        columns: of the matrix.
        dtype: as there.
        device: of the blocks.
    """

    def __init__(self, columns: int, dtype: str, device: torch.device | str):
        self._stored = torch.finfo(torch.float32 if dtype == "F64" else torch_dtype(dtype))
        self._rows: list[torch.Tensor] = []
        self._columns = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        """The next rows of both models, fp32."""
        squares = _square_power(base, self._stored.tiny).add_(
            _square_power(tuned, self._stored.tiny))
        self._rows.append(squares.sum(1).double())
        self._columns += squares.sum(0).double()

    def noise(self) -> Noise:
        """Of all rows; ulp^2 / 12, the mean of both models."""
        scale = self._stored.eps ** 2 / 24
        rows, columns = torch.cat(self._rows).cpu() * scale, self._columns.cpu() * scale
        energy = float(rows.sum())
        return Noise((energy / (len(rows) * len(columns))) ** 0.5, noise_edge(rows, columns),
                     energy)


def noise_edge(rows: torch.Tensor, columns: torch.Tensor) -> float:
    """The largest singular value of noise whose variances have these sums.

    Args:
        rows: [m], the sum of the variances of each row, fp64 on the CPU.
        columns: [n], the same of each column; both have the same total.
    """
    total = float(rows.sum())
    if total == 0:
        return 0.0
    # In units in which the variances are a_i b_j / total.
    a, b = (_group(x.numpy() / total) for x in (rows, columns))
    best, centre, spread = math.inf, (len(rows) * len(columns)) ** 0.5, 1e3
    for _ in range(3):  # each time closer around the best of the last
        t = centre * np.geomspace(1 / spread, spread, _POINTS)
        squares = t * _solve(*a, t) * _solve(*b, t)
        best, centre = float(squares.min()), float(t[squares.argmin()])
        spread **= 3 / _POINTS
    return (best * total) ** 0.5


def _group(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(mean, count)` of groups of values of about one size, the largest first."""
    ordered = np.sort(sizes)[::-1]
    edges = np.unique(np.r_[np.arange(min(_SINGLE, len(ordered)) + 1),
                            np.linspace(0, len(ordered), _GROUPS).astype(int)])
    counts = np.diff(edges)
    return np.add.reduceat(ordered, edges[:-1]) / counts, counts.astype(float)


def _solve(sizes: np.ndarray, counts: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The y > max sizes with sum_i counts_i sizes_i / (y - sizes_i) = t, for every t.

    By Newton on the inverse of both sides, which is concave in y and nearly straight: from the
    upper bound of all sizes equal to the largest, to the left of the solution and up to it.
    """
    lowest = sizes[0] * (1 + counts[0] / t)
    y = sizes[0] * (1 + counts.sum() / t)
    weights = counts * sizes
    for _ in range(_NEWTON_STEPS):
        gaps = 1 / (y[:, None] - sizes)
        parts = gaps * weights
        found, slope = parts.sum(1), (parts * gaps).sum(1)
        y = np.maximum(y + (1 / t - 1 / found) * found ** 2 / slope, lowest)
    return y


def _square_power(x: torch.Tensor, tiny: float) -> torch.Tensor:
    """The square of the largest power of two in |x|, and of `tiny` at the least."""
    powers = (x.float().view(torch.int32) & _FP32_EXPONENT).view(torch.float32)
    if tiny > _NO_SQUARE:
        powers.clamp_(min=tiny)
    return powers.square_()
