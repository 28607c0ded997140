"""What is computed where: from the positions of rows to the tiles that a kernel gets.

A *run* is rows whose positions rise evenly, and a part of a sequence is a few runs. `plan_tiles`
cuts query runs x key runs into *tiles*, blocks of query rows x key rows with a mask that a kernel
knows, so that each visible (query, key) pair is in exactly one tile. `fit_tiles` cuts them further
for kernels that know fewer masks. Neither looks at single positions: planning takes the time of
the documents and runs, not that of the tokens.

Rows are indices into the tensors that the planner was given runs for.
"""

import functools
import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from extend.ring.mask import Mask, TileMask
from extend.ring.pieces import Piece, cut, trim


class Run(NamedTuple):
    """`count` consecutive rows that hold the positions start, start + stride, ..."""

    start: int
    stride: int
    count: int


class Tile(NamedTuple):
    """Query rows that meet key rows; slices with explicit start and stop."""

    q: slice
    kv: slice
    mask: TileMask

    def __hash__(self) -> int:  # slices have a hash of their own from Python 3.12 on
        return hash((self.q.start, self.q.stop, self.kv.start, self.kv.stop, self.mask))


def positions_of(runs: Sequence[Run]) -> Tensor:
    """The positions that `runs` hold, int64 [rows], in the order of their rows."""
    held = [torch.arange(run.count) * run.stride + run.start for run in runs]
    return torch.cat(held) if held else torch.empty(0, dtype=torch.int64)


def merge_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same rows in as few runs as possible: a run that continues its neighbour joins it.

    Raises:
        ValueError: the strides differ; a run of one row has any stride.
    """
    return _merge(runs, _common_stride(runs))


@functools.lru_cache(maxsize=1024)
def plan_tiles(queries: tuple[Run, ...], keys: tuple[Run, ...], mask: Mask) -> tuple[Tile, ...]:
    """Cut what `queries` see of `keys` into tiles; each visible pair is in exactly one.

    Every query row of a tile sees a key of it, and every key row is seen. A bound that binds
    nothing is None. Documents side by side share a tile where they can (`TileMask.cu_seqlens`).

    Raises:
        ValueError: the strides of the runs differ, or a position lies behind the last document.
    """
    stride = _common_stride(queries + keys)
    theirs = _by_document(keys, stride, mask.cu_seqlens)
    pieces: list[Piece] = []
    for document, ours in _by_document(queries, stride, mask.cu_seqlens).items():
        pieces += _pair(ours, theirs.get(document, []), stride, mask)
    return _pack(_join_full(pieces))


@functools.lru_cache(maxsize=1024)
def fit_tiles(tiles: tuple[Tile, ...], *, bands: bool, packed: bool) -> tuple[Tile, ...]:
    """Cut `tiles` into such as a kernel takes, without computing anything twice or for nothing.

    Args:
        bands: it takes any (lo, hi). Otherwise only FULL rectangles, CAUSAL squares and ANTICAUSAL
            squares come back: a window of w over n rows turns into a CAUSAL square of side w and an
            ANTICAUSAL one of side w - 1 for every w rows.
        packed: it takes cu_seqlens. Otherwise a packed tile turns into one tile a document.
    """
    if bands and packed:
        return tiles
    pieces = [piece for tile in tiles for piece in _documents_of(tile)]
    if not bands:
        pieces = [part for piece in pieces for part in cut(piece)]
    return _pack(pieces) if packed else tuple(_tile([piece]) for piece in pieces)


def rows_needed(tiles: Iterable[Tile]) -> slice | None:
    """The smallest slice of key rows that holds those of every tile; None without tiles."""
    held = [tile.kv for tile in tiles]
    if not held:
        return None
    return slice(min(rows.start for rows in held), max(rows.stop for rows in held))


class _Segment(NamedTuple):
    """Rows of one run and one document: the first row, its position, and how many."""

    row: int
    start: int
    count: int


def _common_stride(runs: Sequence[Run]) -> int:
    strides = sorted({run.stride for run in runs if run.count > 1})
    if len(strides) > 1:
        raise ValueError(
            f"runs with strides {strides[0]} and {strides[-1]} meet; queries and keys must come "
            "from one layout, either both or neither put together from several ranks"
        )
    return strides[0] if strides else 1


def _merge(runs: Sequence[Run], stride: int) -> tuple[Run, ...]:
    merged: list[Run] = []
    for start, _, count in runs:
        last = merged[-1] if merged else None
        if last and last.start + last.count * stride == start:
            merged[-1] = Run(last.start, stride, last.count + count)
        elif count:
            merged.append(Run(start, stride, count))
    return tuple(merged)


def _by_document(
    runs: Sequence[Run], stride: int, cu_seqlens: tuple[int, ...] | None
) -> dict[int, list[_Segment]]:
    """The runs, cut where documents begin, in the order of their rows."""
    bounds = cu_seqlens or (0, sys.maxsize)
    documents: dict[int, list[_Segment]] = {}
    row = 0
    for start, _, count in _merge(runs, stride):
        if start + (count - 1) * stride >= bounds[-1]:
            raise ValueError(
                f"a run ends at position {start + (count - 1) * stride}, behind the last document, "
                f"which ends at {bounds[-1]}; cu_seqlens must be those of the whole sequence"
            )
        document = 0
        while count > 0:
            document = bisect_right(bounds, start, document) - 1
            inside = min(count, -((start - bounds[document + 1]) // stride))
            documents.setdefault(document, []).append(_Segment(row, start, inside))
            row, start, count = row + inside, start + inside * stride, count - inside
    return documents


def _pair(ours: list[_Segment], theirs: list[_Segment], stride: int, mask: Mask) -> Iterator[Piece]:
    """What the queries of one document see of its keys."""
    reach = math.inf if mask.window is None else (mask.window - 1) // stride  # in rows of one run
    if mask.causal and _is_square(ours, theirs, stride, reach):
        rows = sum(segment.count for segment in ours)
        q, kv = ours[0].row, theirs[0].row
        yield Piece(range(q, q + rows), range(kv, kv + rows), q - kv, q - kv + reach)
        return
    for q in ours:
        for kv in theirs:
            piece = _see(q, kv, stride, mask)
            if piece:
                yield piece


def _see(q: _Segment, kv: _Segment, stride: int, mask: Mask) -> Piece | None:
    # Rows i and j hold q.start + stride * (i - q.row) and kv.start + stride * (j - kv.row).
    lo, hi = -math.inf, math.inf
    rows_ahead, ahead = q.row - kv.row, q.start - kv.start
    if mask.causal:
        lo = rows_ahead - ahead // stride
    if mask.window is not None:
        hi = rows_ahead + (mask.window - 1 - ahead) // stride
    queries, keys = range(q.row, q.row + q.count), range(kv.row, kv.row + kv.count)
    return trim(Piece(queries, keys, lo, hi))


def _is_square(ours: list[_Segment], theirs: list[_Segment], stride: int, reach: float) -> bool:
    """Whether rows can stand for positions: the same rising ones on both sides, all in reach."""
    if [segment[1:] for segment in ours] != [segment[1:] for segment in theirs]:
        return False
    for segments in (ours, theirs):
        for a, b in pairwise(segments):
            if a.row + a.count != b.row or a.start + (a.count - 1) * stride >= b.start:
                return False
    rows = sum(segment.count for segment in ours)
    span = ours[-1].start + (ours[-1].count - 1) * stride - ours[0].start
    return max(rows - 1, span / stride) <= reach


def _join_full(pieces: list[Piece]) -> list[Piece]:
    """Join pieces without a binding bound: over adjacent queries first, then over adjacent keys."""
    full = [piece for piece in pieces if not (piece.binds_lo or piece.binds_hi)]
    bound = [piece for piece in pieces if piece.binds_lo or piece.binds_hi]
    return bound + _join(_join(full, "q", "kv"), "kv", "q")


def _join(pieces: list[Piece], along: str, across: str) -> list[Piece]:
    """Join full pieces that adjoin in rows `along` ("q" or "kv") and are the same `across`."""

    def order(piece: Piece) -> tuple[int, ...]:
        rows, same = getattr(piece, along), getattr(piece, across)
        return same.start, same.stop, rows.start

    joined: list[Piece] = []
    for piece in sorted(pieces, key=order):
        last = joined[-1] if joined else piece
        before, rows = getattr(last, along), getattr(piece, along)
        if getattr(last, across) == getattr(piece, across) and before.stop == rows.start:
            both = {along: range(before.start, rows.stop)}
            joined[-1] = last._replace(**both, lo=-math.inf, hi=math.inf)
        else:
            joined.append(piece)
    return joined


def _pack(pieces: list[Piece]) -> tuple[Tile, ...]:
    """Tiles by rising rows; squares that adjoin and have the same bounds share one."""
    groups: list[list[Piece]] = []
    ends: dict[tuple[float, ...], list[Piece]] = {}  # where the next square would begin
    for piece in sorted(pieces, key=lambda piece: (piece.q.start, piece.kv.start)):
        if not piece.packs:
            groups.append([piece])
            continue
        group = ends.pop((piece.q.start, piece.kv.start, piece.lo, piece.hi), [])
        if not group:
            groups.append(group)
        group.append(piece)
        ends[piece.q.stop, piece.kv.stop, piece.lo, piece.hi] = group
    return tuple(_tile(group) for group in groups)


def _tile(group: list[Piece]) -> Tile:
    first, last = group[0], group[-1]
    lo = first.lo - first.diagonal if any(piece.binds_lo for piece in group) else None
    hi = first.hi - first.diagonal if any(piece.binds_hi for piece in group) else None
    cu_seqlens = None
    if len(group) > 1:
        cu_seqlens = (0, *(piece.q.stop - first.q.start for piece in group))
    return Tile(
        slice(first.q.start, last.q.stop), slice(first.kv.start, last.kv.stop),
        TileMask(lo, hi, cu_seqlens),
    )  # fmt: skip


def _documents_of(tile: Tile) -> list[Piece]:
    """A tile as pieces; a packed tile as one piece a document."""
    q, kv, mask = tile
    lo = -math.inf if mask.lo is None else mask.lo + q.start - kv.start
    hi = math.inf if mask.hi is None else mask.hi + q.start - kv.start
    if mask.cu_seqlens is None:
        return [Piece(range(q.start, q.stop), range(kv.start, kv.stop), lo, hi)]
    return [
        Piece(range(q.start + a, q.start + b), range(kv.start + a, kv.start + b), lo, hi)
        for a, b in pairwise(mask.cu_seqlens)
    ]
