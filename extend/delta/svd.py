"""Truncated singular value decomposition of a delta, split into LoRA factors.

Exact through the Gram matrix for matrices that are not much larger than the rank. For larger ones a
block Krylov space: D times a seeded random block, then D D^T times the block before, each made
orthonormal to all that came before. A block is half as wide as the rank, so that the space reaches
a high power of D D^T for few products, and it grows until another block would add next to nothing
to what the leading ranks hold: the gains of the last two are carried on as a geometric series.
Whether it would is asked less often the larger it is, because each answer takes its eigenvalues.
Neither calls a full SVD: with U the eigenvectors of D D^T, the rows of U^T D are the singular
values times the right singular vectors, and B A = U U^T D is a projection, so errors in small
singular values do no harm.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), section 4.5 and
algorithm 5.1; Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
singular value decomposition" (2015). The residual stays within 0.5 % of the optimum, flat noise
spectra included (tests/delta/test_svd.py). A block cannot see more directions of exactly one value
than it has columns; the space then ends early if that holds for three values or more.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

_FIRST_GUESS = 64  # rank that is looked for first where the rank is to be found
_SMALLEST_BLOCK = 8
_FEWEST_BLOCKS = 4
_MOST_MISSED = 0.002  # of the squared residual, by ending here: 0.1 % of the residual
_STEPS = 8  # a space of more blocks grows by that share of itself before it is looked at again
_EXACT_BELOW = 3  # ranks; a Krylov space for them costs as much as the whole Gram matrix
_EXACT_ROWS = 128  # up to which the Gram matrix costs next to nothing
_HOST_EIGH = 512  # rows; a CPU decomposes matrices up to this size faster than a GPU does
_COLUMN_BLOCK = 4096
_NORM_BLOCK = 2**18  # elements
_INDEPENDENT = 1e-3  # share of a column that must be its own, so that rounding is small beside it
_FRESH = 0.05  # size of a random direction beside one that is kept
_FP32_SHARE = 1e-2  # of ||delta||_F^2 outside the rank, above which an fp32 Gram matrix is enough
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
    """Double the ranks looked for until `find_rank(values, ||delta||_F^2)` finds one among them.

    `sizes` are the first number of ranks, and the last, at which there is always one to be found.
    A space of most of the matrix costs what the exact decomposition does, which ends it.
    """
    wide, flipped = _wide(delta)
    total, (size, last) = frobenius_squared(wide), sizes
    space = None
    while not exact and wide.shape[0] > max(_EXACT_ROWS, _EXACT_BELOW * size):
        space = space or _Krylov(wide, max(_SMALLEST_BLOCK, -(-size // 2)), generator)
        if not space.complete(size, total):
            break
        rank = find_rank(space.values[:size], total)
        if rank is not None:
            return _split(*space.leading(rank), total, flipped)
        size = min(2 * size, last)
    energies, vectors = _eigh(_gram(wide))
    values = energies.clamp_min(0).sqrt()
    # Shares are of what the decomposition found: its own rounding must not cost a rank.
    rank = find_rank(values, float(energies.clamp_min(0).sum())) or wide.shape[0]
    left = vectors[:, :rank].to(wide.device, torch.float32)
    return _split(left, left.T @ wide, total, flipped)


class _Krylov:
    """A growing orthonormal basis of the leading left singular vectors of a wide matrix.

    Blocks are rows, so that the matrix is the right factor of every product: a CPU is a quarter
    faster at x M than at M^T x^T.

    Attributes:
        values: the singular values of the matrix within the space, falling.
    """

    def __init__(self, wide: torch.Tensor, block: int, generator: torch.Generator):
        start = torch.rand(wide.shape[1], block, generator=generator).T - 0.5
        self._wide, self._block, self._generator = wide, block, generator
        self._image = start.to(wide.device)  # of the last block: block wide
        self._basis = wide.new_empty(0, wide.shape[0])
        self._images = wide.new_empty(0, wide.shape[1])  # basis wide
        self._gram = wide.new_empty(0, 0)  # images images^T
        self._vectors = torch.empty(0, 0)
        self.values = torch.empty(0)

    def complete(self, rank: int, total: float) -> bool:
        """Grow until the space holds the leading `rank` values; False when it grew too large."""
        held, gains, missed = 0.0, [], math.inf
        while (missed > _MOST_MISSED * max(total - held, _ENERGY_FLOOR * total)
               or len(self._basis) < _FEWEST_BLOCKS * self._block):
            blocks = max(1, len(self._basis) // (_STEPS * self._block))
            if 3 * (len(self._basis) + blocks * self._block) > 2 * self._wide.shape[0]:
                return False
            for _ in range(blocks):
                self._extend()
            if len(self._basis) >= rank:
                before, held = held, self._held(rank)
                gains.append(held - before)
                missed = _all_later(*gains[-2:]) if len(gains) > 2 else math.inf
        # fp32 squares hide values below 1e-3 of the largest, which count where little is left.
        gram = self._gram if total - held > _FP32_SHARE * total else _gram(self._images)
        energies, self._vectors = _eigh(gram)
        self.values = energies.double().clamp_min(0).sqrt()
        return True

    def _held(self, rank: int) -> float:
        if len(self._gram) == rank:
            return float(self._gram.diagonal().double().sum())
        energies = torch.linalg.eigvalsh(_on_faster_side(self._gram))
        return float(energies[-rank:].double().clamp_min(0).sum())

    def _extend(self) -> None:
        block = self._new_directions(self._image @ self._wide.T)
        self._image = block @ self._wide
        self._basis = torch.cat([self._basis, block])
        self._images = torch.cat([self._images, self._image])
        cross = self._image @ self._images.T
        top = torch.cat([self._gram, cross[:, :-self._block].T], 1)
        self._gram = torch.cat([top, cross])

    def _new_directions(self, block: torch.Tensor) -> torch.Tensor:
        """Orthonormal rows that span what the block adds to the basis, then random directions.

        Rows that add nothing, as those of a matrix of low rank, leave only rounding behind.
        """
        while True:
            for _ in range(2):  # once leaves what rounding mixed in, twice is enough
                block = block - (block @ self._basis.T) @ self._basis
            found = _orthonormal(block)
            if found is not None:
                return found
            fresh = torch.rand(block.T.shape, generator=self._generator).T.to(block.device) - 0.5
            block = torch.linalg.qr(block.T).Q.T + _FRESH / fresh.shape[1] ** 0.5 * fresh

    def leading(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(left, rows)` of the leading values; see `_split`."""
        vectors = self._vectors[:, :rank].to(self._wide.device, torch.float32)
        return self._basis.T @ vectors, vectors.T @ self._images


def _all_later(before: float, gained: float) -> float:
    """What all blocks to come would gain, if their gains went on falling as the last two did.

    They fall faster in the end, so this is rather too much.
    """
    if gained <= 0:
        return 0.0
    return gained ** 2 / (before - gained) if before > gained else math.inf


def _orthonormal(block: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal rows of the same span; None where some are nearly of the span of others.

    By Cholesky in fp64, which is faster than QR, on GPUs most of all.
    """
    double = block.double()
    factor, failed = torch.linalg.cholesky_ex(double @ double.T)
    own = factor.diagonal()
    if int(failed) or not bool(own.min() > _INDEPENDENT * own.max()):
        return None
    return torch.linalg.solve_triangular(factor, double, upper=False).float()


def _wide(delta: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The matrix with no more rows than columns, and whether it was transposed for that."""
    return (delta, False) if delta.shape[0] <= delta.shape[1] else (delta.T, True)


def _gram(wide: torch.Tensor) -> torch.Tensor:
    """wide wide^T in fp64: squaring halves the digits, and fp64 has twice those of fp32."""
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=wide.device)
    for block in wide.split(_COLUMN_BLOCK, dim=1):
        block = block.double()
        gram += block @ block.T
    return gram


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, falling, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(_on_faster_side(gram))
    return values.flip(0), vectors.flip(1)


def _on_faster_side(gram: torch.Tensor) -> torch.Tensor:
    """On the CPU where that is small."""
    return gram.cpu() if len(gram) <= _HOST_EIGH else gram


def _rank_reaching(values: torch.Tensor, wanted: float) -> int | None:
    reached = values.double().square().cumsum(0) >= wanted
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


def frobenius_squared(x: torch.Tensor) -> float:
    """||x||_F^2 with squares summed in fp64, so that the result does not depend on the size."""
    if x.is_cuda or x.numel() <= _NORM_BLOCK:
        return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    # A CPU makes the fp64 copy: small ones stay in its caches, and in memory that it holds already.
    x = x if x.is_contiguous() or x.dim() != 2 else x.T
    blocks = x.split(max(1, _NORM_BLOCK // max(1, x[0].numel())))
    return math.fsum(float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
                     for block in blocks)


def _split(left: torch.Tensor, rows: torch.Tensor, total: float, flipped: bool) -> Factors:
    """Give each factor the square root of every singular value.

    Equal shares keep both factors in the range of fp16.

    Args:
        left: [out, r] with orthonormal columns.
        rows: [r, in]; left @ rows approximates the wide matrix, and the norms of the rows are the
            singular values.
    """
    values = torch.linalg.vector_norm(rows, dim=1)
    share = values.sqrt()
    inverse = torch.where(values > 0, 1 / share, torch.zeros_like(share))
    lora_b, lora_a = left * share, rows * inverse[:, None]
    if flipped:
        lora_a, lora_b = lora_b.T, lora_a.T
    return Factors(lora_a.contiguous(), lora_b.contiguous(), values, total)
