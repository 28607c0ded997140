"""What rounding alone puts into a delta: its size, and the singular values it reaches.

A checkpoint stored in 16 bits differs from the one that was trained by up to half a unit in the
last place (ulp) of each weight. Taken as independent and uniform, those errors have the variance
ulp^2 / 12, and a matrix of them has no singular value above sigma (sqrt m + sqrt n): what lies
above this edge is signal, and rank spent below it stores the rounding.

The edge is that of weights of one size. Where rows or columns differ in size, so do their ulps, and
noise reaches further: 1.5 times as far, with 30 values of 576 beyond the edge, for rows and columns
of a 576 x 1536 matrix that spread by 20 %. An adapter then stores some ranks of rounding, which
costs bytes; an edge raised for the largest row would cost signal.

The rounding counted is that of the tuned checkpoint. The base's own is no part of the delta,
because training started from the base as it is stored.

Source: the edge is that of Marchenko and Pastur (1967) in the form of Geman, "A limit theorem for
the norm of random matrices" (1980).
"""

from typing import NamedTuple

import torch

from extend.checkpoint import torch_dtype

_BLOCK = 2**24  # elements that are looked at together
_FP32_EXPONENT = 0x7F800000


class Noise(NamedTuple):
    """Rounding noise of one matrix.

    Attributes:
        sigma: standard deviation of an element.
        edge: the largest singular value that noise of this size reaches.
        energy: the expected ||noise||_F^2.
    """

    sigma: float
    edge: float
    energy: float


def rounding_noise(base: torch.Tensor, tuned: torch.Tensor, dtype: str) -> Noise:
    """The noise of `tuned - base` when `tuned` was rounded to `dtype`.

    Args:
        base: [out, in], any floating-point dtype.
        tuned: [out, in]; the ulps are averaged over the values of both.
        dtype: safetensors name of the dtype that `tuned` is stored in. Differences are taken in
            fp32, so F64 counts as F32.
    """
    rows, columns = base.shape
    variance = (_mean_square_ulp(base, dtype) + _mean_square_ulp(tuned, dtype)) / 24
    sigma = variance ** 0.5
    return Noise(sigma, sigma * (rows ** 0.5 + columns ** 0.5), rows * columns * variance)


def _mean_square_ulp(x: torch.Tensor, dtype: str) -> float:
    """The mean of ulp^2: 2^exponent times the dtype's eps, no smaller than that of subnormals."""
    stored = torch.finfo(torch.float32 if dtype == "F64" else torch_dtype(dtype))
    total = 0.0
    for block in x.reshape(-1).split(_BLOCK):
        bits = block.float().view(torch.int32) & _FP32_EXPONENT
        power = bits.view(torch.float32).clamp_min(stored.tiny)
        total += float(power.double().square().sum())
    return total / x.numel() * stored.eps ** 2
