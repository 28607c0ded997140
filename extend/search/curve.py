"""A monotone curve of factors over the pairs, from four numbers.

A factor divides a pair's plain frequency. Up to the pair `start` it is 1; from there its logarithm
rises to that of `factor` at the pair `end`, along a power of the way; beyond `end` it stays. The
family holds or comes near the analytic methods: a new theta is start 0 and end at the slowest pair
with bend 1, linear is start and end at 0, by-parts and YaRN rise between two pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

DIMENSIONS = 5  # of the unit cube that `from_unit` reads: four of the curve, one of the attention
_BEND_RANGE = 3.0  # bend lies between its inverse and itself
_MIN_WIDTH = 0.05  # pairs; below it the rise is a step


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One setting.

    Attributes:
        start: real pair index up to which the factor is 1.
        end: real pair index from which the factor is `factor`; not below `start`.
        factor: at least 1.
        bend: above 0; exponent of the rise of the factor's logarithm. Below 1 it rises early.
        attention_factor: multiplies cos and sin, as in YaRN.
    """

    start: float
    end: float
    factor: float
    bend: float
    attention_factor: float = 1.0

    def factors(self, num_pairs: int) -> list[float]:
        """Factors of all pairs, fastest first, rounded to seven digits; they never fall."""
        width = max(self.end - self.start, _MIN_WIDTH)
        shares = (min(max((i - self.start) / width, 0.0), 1.0) for i in range(num_pairs))
        rise = math.log(self.factor)
        return [float(f"{math.exp(rise * share ** self.bend):.7g}") for share in shares]

    def to_json(self) -> dict[str, float]:
        return {"start": self.start, "end": self.end, "factor": self.factor, "bend": self.bend,
                "attention_factor": self.attention_factor}


@dataclass(frozen=True, slots=True)
class CurveSpace:
    """The curves that are searched, as points of a unit cube.

    Attributes:
        num_pairs: rotary_dim / 2.
        extension: target length over native length, above 1.
    """

    num_pairs: int
    extension: float

    def from_unit(self, point: Sequence[float]) -> Curve:
        """The curve at a point of [0, 1]^5: start, width of the rise, factor, bend, attention.

        The factor spans [extension / 2, 4 extension] on a log scale, cut at 1: what LongRoPE2
        (Shang et al. 2025, arXiv:2502.20082) found lies in [extension, 2 extension]. The attention
        factor reaches 1.5 times as far above 1 as YaRN's.
        """
        start, width, factor, bend, attention = (min(max(float(v), 0.0), 1.0) for v in point)
        last = self.num_pairs - 1
        low, high = math.log(max(1.0, self.extension / 2)), math.log(4 * self.extension)
        first = start * last
        return Curve(
            start=round(first, 3), end=round(first + width * (last - first), 3),
            factor=float(f"{math.exp(low + factor * (high - low)):.5g}"),
            bend=float(f"{_BEND_RANGE ** (2 * bend - 1):.4g}"),
            attention_factor=round(1 + 0.15 * attention * math.log(self.extension), 4))


def halton(count: int, dimensions: int, skip: int = 0) -> list[list[float]]:
    """Points of [0, 1)^dimensions that fill it evenly; the first is left out, it is 0.

    Source: Halton 1960, doi:10.1007/BF01386213; the radical inverse in the first primes.
    """
    primes = (2, 3, 5, 7, 11, 13, 17, 19)[:dimensions]
    return [[_radical_inverse(i, prime) for prime in primes]
            for i in range(1 + skip, 1 + skip + count)]


def _radical_inverse(index: int, base: int) -> float:
    result, share = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        result += digit * share
        share /= base
    return result
