"""Sums over two tensors, whole or sampled, and what they say: cosine, drift, equal elements.

All sums are fp64. Those of a sample estimate those of the whole, tensor by tensor, and carry their
covariance; functions of them get 95 % intervals by the delta method (first-order Taylor). Sums of
whole tensors have no covariance, so their intervals have no width.

Source: Cochran, "Sampling Techniques" (1977), stratified sampling (chapter 5) and ratio estimates
(chapter 6); Wilson (1927) for proportions, with the effective size of Kish (1965) for strata that
are sampled at different rates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from extend.errors import CheckpointError

_Z = 1.959964  # two-sided 95 % of a normal variable
_BLOCK = 2**22  # elements that are looked at together: 32 MiB in fp64
_BT, _BB, _TT, _DD = range(4)  # of `Moments.sums`


class Estimate(NamedTuple):
    """A number and its 95 % interval; `high` is None where the sample gives no bound."""

    value: float
    low: float
    high: float | None

    def text(self, digits: int = 4) -> str:
        """The number, with its interval where that has a width."""
        shown = f"{self.value:.{digits}g}"
        if self.low == self.high:
            return shown
        if self.high is None:
            return f"{shown} (at least {self.low:.{digits}g})"
        return f"{shown} ({self.low:.{digits}g} to {self.high:.{digits}g})"


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the elements of a base b and a target t.

    Attributes:
        elements: how many there are.
        equal: how many are equal bit for bit, or in value where the dtypes differ.
        sums: [4], fp64: b t, b^2, t^2 and (t - b)^2.
        covariance: [4, 4], fp64: of `sums` as estimates; zero where every element was looked at.
        weight: elements^2 / sampled elements, summed over tensors; 0 where all were looked at.
    """

    elements: int
    equal: float
    sums: torch.Tensor
    covariance: torch.Tensor
    weight: float

    @classmethod
    def total(cls, parts: Iterable["Moments"]) -> "Moments":
        """The moments of several tensors together, sampled independently."""
        parts = list(parts)
        zero = torch.zeros(4, dtype=torch.float64)
        return cls(sum(p.elements for p in parts), sum(p.equal for p in parts),
                   sum((p.sums for p in parts), zero),
                   sum((p.covariance for p in parts), zero.new_zeros(4, 4)),
                   sum(p.weight for p in parts))

    def cosine(self) -> Estimate | None:
        """b t / (||b|| ||t||); None where either is all zeros."""
        bt, bb, tt, _ = self.sums.tolist()
        if not bb or not tt:
            return None
        value = bt / math.sqrt(bb * tt)
        error = _Z * self.cosine_error()
        return Estimate(value, max(-1.0, value - error), min(1.0, value + error))

    def cosine_error(self) -> float:
        """The standard error of `cosine`, 0 where every element was looked at."""
        bt, bb, tt, _ = self.sums.tolist()
        norm = math.sqrt(bb * tt)
        return self._error([1 / norm, -bt / norm / (2 * bb), -bt / norm / (2 * tt), 0.0])

    def drift(self) -> Estimate | None:
        """||t - b|| / ||b||; None where b is all zeros.

        The interval is that of the logarithm, because a ratio of norms is positive and skewed. A
        sample without any difference bounds nothing: its `high` is None.
        """
        _, bb, _, dd = self.sums.tolist()
        if not bb:
            return None
        value = math.sqrt(dd / bb)
        if not dd:
            return Estimate(0.0, 0.0, None if self.weight else 0.0)
        error = math.exp(_Z * self._error([0.0, -0.5 / bb, 0.0, 0.5 / dd]))
        return Estimate(value, value / error, value * error)

    def equal_fraction(self) -> Estimate | None:
        """The fraction of equal elements, with the interval of Wilson; None without elements.

        The effective size counts a tensor's sample by the tensor's share of all elements. The
        interval takes no credit for the tensors' differing among themselves, so it is wide enough.
        """
        if not self.elements:
            return None
        share = self.equal / self.elements
        if not self.weight:
            return Estimate(share, share, share)
        size = self.elements ** 2 / self.weight
        middle = (share + _Z ** 2 / (2 * size)) / (1 + _Z ** 2 / size)
        reach = _Z / (1 + _Z ** 2 / size) * math.sqrt(share * (1 - share) / size
                                                      + (_Z / (2 * size)) ** 2)
        return Estimate(share, max(0.0, min(share, middle - reach)),
                        min(1.0, max(share, middle + reach)))

    def _error(self, gradient: list[float]) -> float:
        slope = self.sums.new_tensor(gradient)
        return math.sqrt(max(0.0, float(slope @ self.covariance @ slope)))


def whole_moments(base: torch.Tensor, target: torch.Tensor) -> Moments:
    """The moments of two tensors of one shape, block by block."""
    sums, equal = torch.zeros(4, dtype=torch.float64), 0
    for b, t in zip(base.reshape(-1).split(_BLOCK), target.reshape(-1).split(_BLOCK)):
        equal += int(_equal(b, t).sum())
        b, t = b.double(), t.double()
        d = t - b
        sums += torch.stack([b @ t, b @ b, t @ t, d @ d]).cpu()
    return Moments(base.numel(), float(equal), sums, sums.new_zeros(4, 4), 0.0)


def sampled_moments(base: torch.Tensor, target: torch.Tensor, elements: int) -> Moments:
    """The moments of a tensor of `elements`, estimated from as many values of each as are given.

    Args:
        base: [m], values at positions drawn independently, or at every position if m is `elements`.
        target: [m], the values at the same positions. Without any, the tensor counts as nothing.
    """
    count = base.numel()
    if not count:
        return Moments.total([])
    b, t = base.double(), target.double()
    terms = torch.stack([b * t, b * b, t * t, (t - b) ** 2])
    equal = float(_equal(base, target).sum()) / count * elements
    whole = count == elements
    covariance = terms.new_zeros(4, 4) if whole or count < 2 else (
        torch.cov(terms) * (elements ** 2 / count))
    return Moments(elements, equal, terms.mean(1) * elements, covariance,
                   0.0 if whole else elements ** 2 / count)


def require_finite(moments: Moments, name: str, where: str) -> None:
    """Raise CheckpointError where a tensor's sums are not finite."""
    if not bool(torch.isfinite(moments.sums).all()):
        raise CheckpointError(f"tensor {name} of {where} holds infinite or NaN values; take a "
                              "checkpoint from before the training diverged")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal(base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if base.dtype != target.dtype:
        return base.double() == target.double()
    bits = _BITS[base.element_size()]
    return base.contiguous().view(bits) == target.contiguous().view(bits)
