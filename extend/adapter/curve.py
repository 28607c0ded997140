"""What smaller adapters would keep, from the singular values of one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from extend.adapter_format.sidecar import ModuleReport

_POINTS = 40


@dataclass(frozen=True, slots=True)
class Point:
    """An adapter of some size.

    Attributes:
        adapter_bytes: of `adapter_model.safetensors`, to some bytes a module.
        mean_rank: of its modules.
        mean_residual: the mean over modules of ||delta - B A||_F / ||delta||_F.
        energy: the part of the squared norm of all modules' deltas together that it holds.
    """

    adapter_bytes: int
    mean_rank: float
    mean_residual: float
    energy: float


class Spectra:
    """The singular values that an adapter holds, and what is lost where they are cut off.

    Args:
        reports: module -> what its factors stand for.
        values: module -> the singular values of its factors, falling; at least one each.
        element_bytes: of the dtype that factors are stored in.
        header_bytes: that the adapter file holds beside the factors.
    """

    def __init__(self, reports: Mapping[str, ModuleReport], values: Mapping[str, torch.Tensor],
                 element_bytes: int, header_bytes: int):
        names = list(reports)
        self._header = header_bytes
        self._cost = torch.tensor([element_bytes * sum(reports[n].shape) for n in names])
        norms = torch.tensor([reports[n].delta_norm for n in names], dtype=torch.float64)
        residuals = torch.tensor([reports[n].residual for n in names], dtype=torch.float64)
        self._squared, self._missing = norms.square(), (norms * residuals).square()
        self.counts = torch.tensor([len(values[n]) for n in names])
        self._values = torch.zeros(len(names), int(self.counts.max()), dtype=torch.float64)
        for row, name in zip(self._values, names):
            row[:len(values[name])] = values[name]

    def equal_ranks(self) -> list[Point]:
        """Points at which every module has the same rank, as far as it holds so many."""
        largest = int(self.counts.max())
        ranks = _spread(largest)
        return [self.at(torch.full_like(self.counts, rank).minimum(self.counts)) for rank in ranks]

    def thresholds(self) -> list[Point]:
        """Points at which all modules are cut at one singular value; rank 1 at least."""
        held = torch.arange(self._values.shape[1]) < self.counts[:, None]
        falling = self._values[held].sort(descending=True).values
        heights = falling[torch.tensor(_spread(len(falling))) - 1].unique()
        points = {point.adapter_bytes: point for height in heights.tolist()
                  if (point := self.at(self._ranks_above(height)))}
        return [points[size] for size in sorted(points)]

    def _ranks_above(self, height: float) -> torch.Tensor:
        return (self._values >= height).sum(1).clamp_min(1).minimum(self.counts)

    def at(self, ranks: torch.Tensor) -> Point:
        """The point at given ranks [modules]."""
        left_out = torch.arange(self._values.shape[1]) >= ranks[:, None]
        lost = self._missing + (self._values.square() * left_out).sum(1)
        residuals = (lost / self._squared).sqrt()
        return Point(self._header + int((self._cost * ranks).sum()), float(ranks.double().mean()),
                     float(residuals.mean()), 1 - float(lost.sum() / self._squared.sum()))

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Both curves, sizes growing."""
        return {"threshold": [asdict(point) for point in self.thresholds()],
                "equal_rank": [asdict(point) for point in self.equal_ranks()]}


def _spread(count: int) -> list[int]:
    """Numbers from 1 to `count`, at most 40, evenly spaced in their logarithm."""
    powers = torch.logspace(0, 1, _POINTS, base=max(count, 1), dtype=torch.float64)
    return sorted({min(count, round(power)) for power in powers.tolist()})
