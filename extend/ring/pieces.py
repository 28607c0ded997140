"""Pieces of the (query row, key row) plane below and above diagonals: trim them, cut them up."""

import math
from typing import NamedTuple


class Piece(NamedTuple):
    """A tile in the making: query row i sees key row j if lo <= i - j <= hi.

    Unlike those of a TileMask these rows count from the start of the tensor, so that cutting rows
    off leaves the bounds alone; -inf and inf are no bound.
    """

    q: range
    kv: range
    lo: float
    hi: float

    @property
    def diagonal(self) -> int:
        """i - j of the first row and the first key."""
        return self.q.start - self.kv.start

    @property
    def binds_lo(self) -> bool:
        return self.q.start - (self.kv.stop - 1) < self.lo

    @property
    def binds_hi(self) -> bool:
        return self.q.stop - 1 - self.kv.start > self.hi

    @property
    def packs(self) -> bool:
        """A square without bounds, or one whose diagonal is the lower bound."""
        no_bounds = self.lo == -math.inf and self.hi == math.inf
        return len(self.q) == len(self.kv) and (self.lo == self.diagonal or no_bounds)


def trim(piece: Piece) -> Piece | None:
    """The piece without rows that see nothing and without keys that nobody sees."""
    q, kv, lo, hi = piece
    rows = range(max(q.start, kv.start + lo), min(q.stop, kv.stop + hi))
    keys = range(max(kv.start, q.start - hi), min(kv.stop, q.stop - lo))
    return Piece(rows, keys, lo, hi) if rows and keys and lo <= hi else None


def cut(piece: Piece) -> list[Piece]:
    """Rectangles without a bound, and squares whose diagonal is the bound."""
    if piece.binds_lo and piece.binds_hi:
        return _cut_band(piece)
    if piece.binds_lo:
        return _cut_below(piece)
    if piece.binds_hi:
        return [_mirror(part) for part in _cut_below(_mirror(piece))]
    return [piece._replace(hi=math.inf)]


def _cut_band(piece: Piece) -> list[Piece]:
    """For every `width` rows what lies before the first row's last key, and the rest."""
    q, kv, lo, hi = piece
    width = hi - lo + 1
    pieces = []
    for row in range(q.start, q.stop, width):
        rows = range(row, min(row + width, q.stop))
        middle = row - lo  # the last key of this row, and the first one `width` rows on
        before = trim(Piece(rows, range(kv.start, min(middle, kv.stop)), -math.inf, hi))
        after = trim(Piece(rows, range(max(middle, kv.start), kv.stop), lo, math.inf))
        pieces += [square for part in (before, after) if part for square in cut(part)]
    return pieces


def _cut_below(piece: Piece) -> list[Piece]:
    """By the lower bound alone: keys that all rows see, a square, and rows that see all keys."""
    q, kv, lo, _ = piece
    corner = q.start - lo  # the last key of the first row
    side = kv.stop - corner
    prefix = Piece(q, range(kv.start, corner), -math.inf, math.inf)
    square = Piece(range(q.start, q.start + side), range(corner, kv.stop), lo, math.inf)
    rest = Piece(range(q.start + side, q.stop), range(corner, kv.stop), -math.inf, math.inf)
    return [part for part in (prefix, square, rest) if part.q and part.kv]


def _mirror(piece: Piece) -> Piece:
    """The piece with its rows and keys counted backwards, which swaps the bounds."""
    q, kv, lo, hi = piece
    return Piece(range(1 - q.stop, 1 - q.start), range(1 - kv.stop, 1 - kv.start), -hi, -lo)
