"""Do the long model's delta and a sibling's own delta want the same directions of a matrix?

Of each matrix of the decoder layers, with L the long model's delta and S = target - base:

- the cosine of L and S as vectors: what they say about the same elements;
- the share of ||L||^2 that lies in the leading left (outputs) and right (inputs) singular subspace
  of S. A subspace of dimension k in m dimensions that has nothing to do with L holds k/m of
  it on average, so shares are given beside that.

Deltas of one family exceed chance even where they do not hinder each other, because gradients of
both lie in the span of the same activations. Sums over matrices weigh each by its energy.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from extend.checkpoint import Checkpoint
from extend.delta.lineage import Lineage
from extend.delta.pair import in_layer_order
from extend.delta.sources import DeltaSource
from extend.delta.svd import factorize_to_rank, tensor_generator
from extend.errors import CheckpointError, CompatibilityError

_NEGLIGIBLE = 1e-5  # of the largest singular value: its direction is rounding
_ROWS = 256  # that are looked at together in fp64


class Conflict(NamedTuple):
    """Energies of two deltas, L (long) and S (sibling), summed over matrices.

    Attributes:
        long, sibling: ||L||^2 and ||S||^2.
        product: the sum of L times S.
        left, right: the part of ||L||^2 inside the leading left or right subspace of S.
        left_chance, right_chance: the part that an unrelated subspace holds on average.
    """

    long: float = 0.0
    sibling: float = 0.0
    product: float = 0.0
    left: float = 0.0
    right: float = 0.0
    left_chance: float = 0.0
    right_chance: float = 0.0

    @classmethod
    def total(cls, parts: Iterable["Conflict"]) -> "Conflict":
        """The sums over several matrices."""
        return cls(*(sum(column) for column in zip(*parts))) if (parts := list(parts)) else cls()

    @property
    def cosine(self) -> float | None:
        """Of the deltas; None where one is zero."""
        norm = math.sqrt(self.long * self.sibling)
        return self.product / norm if norm else None

    def to_json(self) -> dict[str, float | None]:
        """The cosine, and the last four attributes as shares of ||L||^2; None where L is zero."""
        shares = {key: getattr(self, key) / self.long if self.long else None
                  for key in ("left", "right", "left_chance", "right_chance")}
        return {"cosine": self.cosine, **shares}


def measure_conflict(lineage: Lineage, source: DeltaSource, base: Checkpoint, target: Checkpoint,
                     *, rank: int = 16, seed: int = 0) -> dict[str, Conflict]:
    """The conflict of every matrix of the decoder layers; memory is bounded by the largest.

    Args:
        lineage: of `target` against `base`.
        source: the long model's delta from the same base. What it does not name is zero.
        rank: dimension of the leading subspaces, capped at each matrix's own size.
        seed: of the random sketches.

    Raises:
        CompatibilityError: the source changes a parameter that the two models do not share, or at
            another shape.
        CheckpointError: infinite or NaN values.
    """
    unknown = sorted(source.names - lineage.tensors.keys())
    if unknown:
        raise CompatibilityError(f"{source.label} changes {unknown[0]} ({len(unknown)} such), "
                                 f"which {base.directory} and {target.directory} do not both "
                                 "have; give models of one family")
    found = {}
    for name in in_layer_order(lineage.matrices):
        sibling = target.read(name).float() - base.read(name).float()
        long = source.read(name)(...) if name in source.names else torch.zeros_like(sibling)
        if long.shape != sibling.shape:
            raise CompatibilityError(f"tensor {name}: shape {list(long.shape)} in {source.label} "
                                     f"but {list(sibling.shape)} in {target.directory}; give "
                                     "models of one family")
        pairs = zip(*(x.reshape(-1, *x.shape[-2:]) for x in (long, sibling)))
        found[name] = Conflict.total(
            _of_matrix(a, b, rank, tensor_generator(name, seed)) for a, b in pairs)
        if not math.isfinite(sum(found[name])):
            raise CheckpointError(f"tensor {name} of {source.label} holds infinite or NaN values; "
                                  "take one from before the training diverged")
    return found


def _of_matrix(long: torch.Tensor, sibling: torch.Tensor, rank: int,
               generator: torch.Generator) -> Conflict:
    """Both [out, in], fp32."""
    energy, own, product = _dot(long, long), _dot(sibling, sibling), _dot(long, sibling)
    if not own:
        return Conflict(energy, own, product)
    factors = factorize_to_rank(sibling, rank, generator)
    kept = int((factors.values > _NEGLIGIBLE * factors.values[0]).sum())
    left = torch.linalg.qr(factors.lora_b[:, :kept]).Q
    right = torch.linalg.qr(factors.lora_a[:kept].T).Q
    inside_left, inside_right = left.T @ long, long @ right
    return Conflict(energy, own, product, _dot(inside_left, inside_left),
                    _dot(inside_right, inside_right), energy * kept / long.shape[0],
                    energy * kept / long.shape[1])


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(float((x.double() * y).sum()) for x, y in zip(a.split(_ROWS), b.split(_ROWS)))
