"""Truncated singular value decomposition of a delta, split into LoRA factors.

Randomized for large matrices: a seeded Gaussian sketch, power iterations with a QR after every
product, and a small exact decomposition of what the sketch caught. Exact for matrices that are
not much larger than the sketch. Neither calls a full SVD: with U the eigenvectors of D D^T, the
rows of U^T D are the singular values times the right singular vectors, and B A = U U^T D is a
projection, so errors in small singular values do no harm.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and
5.1. With the oversampling and the power iterations below, the residual stays within 0.5 % of the
optimum, flat noise spectra included (tests/delta/test_svd.py).
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch

OVERSAMPLE = 16
POWER_ITERATIONS = 4
_FIRST_GUESS = 64  # rank that the first sketch is made for where the rank is to be found
_COLUMN_BLOCK = 4096
# 1 - energy below this is fp32 rounding of the delta itself, not something to spend rank on.
_ENERGY_FLOOR = 1e-12


class Factors(NamedTuple):
    """A truncated decomposition, from which every smaller rank is a slice.

    Attributes:
        lora_a: [r, in], fp32.
        lora_b: [out, r], fp32.
        values: [r], the singular values, falling.
        total: ||delta||_F^2.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    values: torch.Tensor
    total: float

    @property
    def energy(self) -> float:
        """The part of ||delta||_F^2 that the factors hold."""
        held = float(self.values.double().square().sum())
        return min(held / self.total, 1.0) if self.total else 1.0

    def cut(self, rank: int) -> "Factors":
        """The factors of the leading `rank` singular values; all of them where there are fewer."""
        return Factors(self.lora_a[:rank], self.lora_b[:, :rank], self.values[:rank], self.total)


class _Spectrum(NamedTuple):
    """delta ~ left @ rows, with orthonormal left columns; values are the norms of the rows."""

    left: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor


def tensor_generator(name: str, seed: int) -> torch.Generator:
    """A generator that depends on the tensor's name and the seed, not on the order of work."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def factorize_to_rank(delta: torch.Tensor, rank: int, generator: torch.Generator, *,
                      exact: bool = False) -> Factors:
    """The best factors of a given rank (capped at the matrix's own size).

    Args:
        delta: [out, in], fp32.
        generator: on the CPU, so that every device draws the same sketch.
        exact: decompose the whole Gram matrix, whatever the size.
    """
    rank = min(rank, *delta.shape)
    return _grow(delta, (rank, rank), lambda values, total: rank, generator, exact)


def factorize_to_energy(delta: torch.Tensor, energy: float, generator: torch.Generator, *,
                        exact: bool = False) -> Factors:
    """The fewest ranks whose squared singular values reach `energy` of ||delta||_F^2.

    The sketch doubles until it holds that much; only its leading values, less the oversampling,
    are trusted, so the rank may exceed the exact one by a little but never falls short.

    Args:
        delta: [out, in], fp32, not zero.
        energy: in (0, 1]; 1 asks for every rank above rounding.
    """
    share = min(energy, 1 - _ENERGY_FLOOR)
    return _grow(delta, (_FIRST_GUESS, min(delta.shape)),
                 lambda values, total: _rank_reaching(values, share * total), generator, exact)


def factorize_to_edge(delta: torch.Tensor, edge: float, limit: int, generator: torch.Generator, *,
                      exact: bool = False) -> Factors:
    """The ranks whose singular values exceed `edge`: at least one, at most `limit`.

    The sketch doubles until its smallest trusted value is below the edge.

    Args:
        delta: [out, in], fp32, not zero.
        edge: a singular value.
        limit: the largest rank to look for, at least 1.
    """
    limit = min(limit, *delta.shape)

    def rank_above(values: torch.Tensor, _: float) -> int | None:
        above = int((values > edge).sum())
        return None if above == len(values) < limit else max(1, min(above, limit))

    return _grow(delta, (min(limit, _FIRST_GUESS), limit), rank_above, generator, exact)


def _grow(delta: torch.Tensor, sizes: tuple[int, int],
          find_rank: Callable[[torch.Tensor, float], int | None], generator: torch.Generator,
          exact: bool) -> Factors:
    """Double the sketch until `find_rank(values, ||delta||_F^2)` finds a rank in its values.

    `sizes` are the first one, and the last, at which there is always a rank to be found.
    A sketch of half the matrix or more costs what the exact decomposition does, which ends it.
    """
    wide, flipped = _wide(delta)
    total, (size, last) = _total_energy(wide), sizes
    while not exact and wide.shape[0] > 2 * (size + OVERSAMPLE):
        spectrum = _randomized(wide, size + OVERSAMPLE, generator)
        rank = find_rank(spectrum.values[:size], total)
        if rank is not None:
            return _split(spectrum, rank, total, flipped)
        size = min(2 * size, last)
    spectrum = _exact(wide)
    # Shares are of what the decomposition found: its own rounding must not cost a rank.
    rank = find_rank(spectrum.values, float(spectrum.values.double().square().sum()))
    return _split(spectrum, rank or wide.shape[0], total, flipped)


def _wide(delta: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The matrix with no more rows than columns, and whether it was transposed for that."""
    if delta.shape[0] <= delta.shape[1]:
        return delta, False
    return delta.T.contiguous(), True


def _randomized(wide: torch.Tensor, size: int, generator: torch.Generator) -> _Spectrum:
    sketch = torch.randn(wide.shape[1], size, generator=generator).to(wide.device)
    basis = torch.linalg.qr(wide @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        other = torch.linalg.qr(wide.T @ basis).Q
        basis = torch.linalg.qr(wide @ other).Q
    inner = _exact(basis.T @ wide)
    return _Spectrum(basis @ inner.left, inner.rows, inner.values)


def _exact(wide: torch.Tensor) -> _Spectrum:
    """All singular triples of a wide matrix through its Gram matrix in fp64.

    Squaring halves the digits, and fp64 has twice those of the fp32 data.
    """
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=wide.device)
    for block in wide.split(_COLUMN_BLOCK, dim=1):
        block = block.double()
        gram += block @ block.T
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)  # eigh sorts upwards
    left = vectors.float()
    rows = left.T @ wide
    return _Spectrum(left, rows, torch.linalg.vector_norm(rows, dim=1))


def _rank_reaching(values: torch.Tensor, wanted: float) -> int | None:
    reached = values.double().square().cumsum(0) >= wanted
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


def _total_energy(wide: torch.Tensor) -> float:
    return sum(float(block.double().square().sum()) for block in wide.split(_COLUMN_BLOCK, dim=1))


def _split(spectrum: _Spectrum, rank: int, total: float, flipped: bool) -> Factors:
    """Cut to `rank` and give each factor the square root of every singular value.

    Equal shares keep both factors in the range of fp16.
    """
    values = spectrum.values[:rank]
    share = values.sqrt()
    inverse = torch.where(values > 0, 1 / share, torch.zeros_like(share))
    lora_b = spectrum.left[:, :rank] * share
    lora_a = spectrum.rows[:rank] * inverse[:, None]
    if flipped:
        lora_a, lora_b = lora_b.T, lora_a.T
    return Factors(lora_a.contiguous(), lora_b.contiguous(), values, total)
