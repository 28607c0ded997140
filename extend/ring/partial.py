"""Sums of partial results: attention and its gradients from keys that come in portions.

Shapes: b batch, h query heads, h_kv key heads, s local queries, n keys of a portion, d head_dim.
The first result is kept as the kernel gives it; a second one is added in place, rounding once; from
three on the sums are fp32, so that rounding does not grow with the number of portions.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from extend.ring.call import Call
from extend.ring.groups import num_head_groups
from extend.ring.lse import merge_partial, write_sum
from extend.ring.mask import TileMask
from extend.ring.tiles import Tile

_FEW = 4  # tiles whose dq are kept until all have come


class AttentionSum:
    """Attention of q [b, h, s, d] over keys that come in portions."""

    def __init__(self, q: Tensor, call: Call, portions: Sequence[tuple[Tile, ...]]):
        """Prepare for the tiles of all `portions`, in any order."""
        self._q, self._call = q, call
        self._rows = _Rows(q.shape[2], portions)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(
        self, tiles: tuple[Tile, ...], k: Tensor, v: Tensor, heads: slice | None = None
    ) -> None:
        """Add attention over k, v [b, h_kv, n, d]; `heads` are the query heads that see them."""
        for tile in tiles:
            block_out, block_lse = self._call.kernel.forward(
                _part(self._q, heads, tile.q), k[:, :, tile.kv], v[:, :, tile.kv],
                mask=tile.mask, softmax_scale=self._call.softmax_scale,
            )  # fmt: skip
            self._join(heads, tile.q, block_out, block_lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out [b, h, s, d] in q's dtype and lse [b, h, s]."""
        return self._out.to(self._q.dtype), self._lse

    def _join(
        self, heads: slice | None, rows: slice, block_out: Tensor, block_lse: Tensor
    ) -> None:
        if self._out is None:
            if block_out.shape == self._q.shape:
                self._out, self._lse = block_out, block_lse
                self._rows.touch(heads, rows)
                return
            self._out = torch.zeros_like(self._q)
            self._lse = block_lse.new_full(self._q.shape[:3], float("-inf"))
        new = self._rows.touch(heads, rows)
        if not new and self._rows.many and self._out.dtype == self._q.dtype:
            self._out = self._out.to(torch.promote_types(self._out.dtype, torch.float32))
        out, lse = _part(self._out, heads, rows), _part(self._lse, heads, rows)
        if new:
            write_sum(out, block_out)
            lse.copy_(block_lse)
        else:
            merge_partial(out, lse, block_out, block_lse)


class GradientSum:
    """dq [b, h, s, d] from keys that come in portions, and each portion's share of dk and dv."""

    def __init__(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, call: Call,
        portions: Sequence[tuple[Tile, ...]],
    ):  # fmt: skip
        """`out` and `lse` are over all keys: a tile's backward from them is its share exactly."""
        self._dout, self._q, self._out, self._lse, self._call = dout, q, out, lse, call
        # With at most two results a row, and few in all, they wait for each other and are written
        # once; otherwise they are summed as they come.
        self._few = _most_results(portions) <= 2 and sum(map(len, portions)) <= _FEW
        self._parts: list[tuple[slice, slice, Tensor]] = []
        self._dq: Tensor | None = None

    def add(
        self, tiles: tuple[Tile, ...], k: Tensor, v: Tensor, heads: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The share of this rank's queries in dk, dv [b, h_kv, n, d] of k and v.

        In the dtype of k, or fp32 where it is a sum over tiles (see `sums_keys`).
        """
        shares = _KeyShares(k, tiles)
        for tile in tiles:
            dout, q, out, lse = (
                _part(t, heads, tile.q) for t in (self._dout, self._q, self._out, self._lse)
            )
            dq, dk, dv = _backward(
                self._call, dout, q, k[:, :, tile.kv], v[:, :, tile.kv], out, lse, tile.mask)
            self._join(heads, tile.q, dq)
            shares.add(tile.kv, dk, dv)
        return shares.result()

    def dq(self) -> Tensor:
        """dq [b, h, s, d] in q's dtype."""
        if self._dq is None:
            return assemble(self._q, self._parts)
        return self._dq.to(self._q.dtype)

    def _join(self, heads: slice | None, rows: slice, dq: Tensor) -> None:
        if self._few:
            self._parts.append((heads or slice(0, self._q.shape[1]), rows, dq))
            return
        if self._dq is None:
            dtype = torch.promote_types(self._q.dtype, torch.float32)
            self._dq = torch.zeros_like(self._q, dtype=dtype)
        part = _part(self._dq, heads, rows)
        write_sum(part, part, dq)


def _backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: TileMask,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A tile's gradients, some heads after others where its rows are very many."""
    options = {"mask": mask, "softmax_scale": call.softmax_scale}
    count = num_head_groups(k.shape[1], q.numel())
    if count == 1:
        return call.kernel.backward(dout, q, k, v, out, lse, **options)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    by_heads = (torch.chunk(t, count, dim=1) for t in (dout, q, k, v, out, lse, *grads))
    for *tensors, dq, dk, dv in zip(*by_heads, strict=True):
        parts = call.kernel.backward(*tensors, **options)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            whole.copy_(part)
    return grads


def assemble(like: Tensor, parts: Sequence[tuple[slice, slice, Tensor]]) -> Tensor:
    """A tensor like `like` [b, h, s, d] from `parts`: (heads, rows, what they add).

    At most two add to a cell; every cell is written once, with one rounding.
    """
    if len(parts) == 1 and parts[0][2].shape == like.shape:
        return parts[0][2].to(like.dtype)
    whole = torch.empty_like(like)
    for heads in _cuts([heads for heads, _, _ in parts], like.shape[1]):
        for rows in _cuts([rows for _, rows, _ in parts], like.shape[2]):
            cell = whole[:, heads, rows]
            adding = [
                part[:, _inside(heads, of_heads), _inside(rows, of_rows)]
                for of_heads, of_rows, part in parts
                if _covers(of_heads, heads) and _covers(of_rows, rows)
            ]
            write_sum(cell, *adding) if adding else cell.zero_()
    return whole


def _cuts(spans: Sequence[slice], size: int) -> list[slice]:
    """0 to `size`, cut where any of the spans begins or ends."""
    bounds = sorted({0, size, *(s.start for s in spans), *(s.stop for s in spans)})
    return [slice(a, b) for a, b in pairwise(bounds)]


def _covers(span: slice, cell: slice) -> bool:
    return span.start <= cell.start and cell.stop <= span.stop


def _inside(cell: slice, span: slice) -> slice:
    """`cell` counted from the beginning of `span`."""
    return slice(cell.start - span.start, cell.stop - span.start)


class _KeyShares:
    """dk and dv [b, h_kv, n, d] of one portion, summed over its tiles."""

    def __init__(self, k: Tensor, tiles: tuple[Tile, ...]):
        self._k, self._tiles = k, tiles
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, rows: slice, dk: Tensor, dv: Tensor) -> None:
        if self._sums is None:
            if len(self._tiles) == 1 and dk.shape == self._k.shape:
                self._sums = dk, dv
                return
            dtype = self._k.dtype
            if sums_keys(self._tiles):
                dtype = torch.promote_types(dtype, torch.float32)
            self._sums = tuple(torch.zeros_like(self._k, dtype=dtype) for _ in range(2))
        for total, share in zip(self._sums, (dk, dv), strict=True):
            part = total[:, :, rows]
            write_sum(part, part, share)

    def result(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            return torch.zeros_like(self._k), torch.zeros_like(self._k)
        return self._sums


def _most_results(portions: Sequence[tuple[Tile, ...]]) -> int:
    """The largest number of tiles that one query row is in."""
    return _depth(tuple((t.q.start, t.q.stop) for tiles in portions for t in tiles))


def sums_keys(tiles: tuple[Tile, ...]) -> bool:
    """Whether some key row is in more than one of the tiles."""
    return _depth(tuple((t.kv.start, t.kv.stop) for t in tiles)) > 1


class _Rows:
    """Which rows already hold a result, and whether some get more than two."""

    def __init__(self, num_rows: int, portions: Sequence[tuple[Tile, ...]]):
        self.many = _most_results(portions) > 2
        # 1 where a row has a result: of all heads, and by first head of what came for some only.
        self._all = bytearray(num_rows)
        self._some: dict[int, bytearray] = {}

    def touch(self, heads: slice | None, rows: slice) -> bool:
        """Note a result for `rows`; True if none of them had one for any of these heads."""
        held = [self._all]
        if heads is None:
            held += self._some.values()
        else:
            held.append(self._some.setdefault(heads.start, bytearray(len(self._all))))
        new = all(rows_held.find(1, rows.start, rows.stop) < 0 for rows_held in held)
        noted = held[0] if heads is None else held[-1]
        noted[rows.start : rows.stop] = b"\1" * (rows.stop - rows.start)
        return new


def _part(t: Tensor, heads: slice | None, rows: slice) -> Tensor:
    return t[:, :, rows] if heads is None else t[:, heads, rows]


@functools.lru_cache(maxsize=4096)
def _depth(spans: tuple[tuple[int, int], ...]) -> int:
    """The largest number of spans that share a row."""
    edges = sorted([(start, 1) for start, _ in spans] + [(stop, -1) for _, stop in spans])
    depth = largest = 0
    for _, change in edges:  # at equal rows ends (-1) come first
        depth += change
        largest = max(largest, depth)
    return largest
