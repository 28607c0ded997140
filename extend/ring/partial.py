"""Sums of partial results: attention and its gradients from keys that come in portions.

Shapes: b batch, h query heads, h_kv key heads, s local queries, n keys of a portion, d head_dim.
The first result is kept as the kernel gives it; a second one is added in place, rounding once; from
three on the sums are fp32, so that rounding does not grow with the number of portions.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from extend.ring.call import Call
from extend.ring.lse import merge_partial
from extend.ring.tiles import Tile


class AttentionSum:
    """Attention of q [b, h, s, d] over keys that come in portions."""

    def __init__(self, q: Tensor, call: Call, portions: Sequence[tuple[Tile, ...]]):
        """Prepare for the tiles of all `portions`, in any order."""
        self._q, self._call = q, call
        self._rows = _Rows(q.shape[2], portions)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, tiles: tuple[Tile, ...], k: Tensor, v: Tensor, heads: slice | None = None) -> None:
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
            shape = self._q.shape[:3]
            self._lse = torch.full(shape, float("-inf"), dtype=block_lse.dtype, device=self._q.device)
        new = self._rows.touch(heads, rows)
        if not new and self._rows.many and self._out.dtype == self._q.dtype:
            self._out = self._out.to(torch.promote_types(self._out.dtype, torch.float32))
        out, lse = _part(self._out, heads, rows), _part(self._lse, heads, rows)
        if new:
            out.copy_(block_out)
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
        self._rows = _Rows(q.shape[2], portions)
        self._dq: Tensor | None = None
        self._early: list[tuple[slice | None, slice, Tensor]] = []

    def add(
        self, tiles: tuple[Tile, ...], k: Tensor, v: Tensor, heads: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The share of this rank's queries in dk, dv [b, h_kv, n, d] of k and v, in their dtype."""
        shares = _KeyShares(k, tiles)
        for tile in tiles:
            dout, q, out, lse = (
                _part(t, heads, tile.q) for t in (self._dout, self._q, self._out, self._lse)
            )
            dq, dk, dv = self._call.kernel.backward(
                dout, q, k[:, :, tile.kv], v[:, :, tile.kv], out, lse,
                mask=tile.mask, softmax_scale=self._call.softmax_scale,
            )  # fmt: skip
            self._join(heads, tile.q, dq)
            shares.add(tile.kv, dk, dv)
        return shares.result()

    def dq(self) -> Tensor:
        """dq [b, h, s, d] in q's dtype."""
        if self._dq is None:
            self._start(torch.zeros_like(self._q))
        return self._dq.to(self._q.dtype)

    def _join(self, heads: slice | None, rows: slice, dq: Tensor) -> None:
        if self._dq is None:
            if dq.shape == self._q.shape:
                self._start(dq)
            else:
                self._early.append((heads, rows, dq))
            return
        if self._rows.many and self._dq.dtype == self._q.dtype:
            self._dq = self._dq.to(torch.promote_types(self._dq.dtype, torch.float32))
        _part(self._dq, heads, rows).add_(dq)

    def _start(self, dq: Tensor) -> None:
        """Take the first result that covers everything, and add those that came before it."""
        self._dq, early, self._early = dq, self._early, []
        for heads, rows, part in early:
            self._join(heads, rows, part)


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
            if _depth(tuple((t.kv.start, t.kv.stop) for t in self._tiles)) > 1:
                dtype = torch.promote_types(dtype, torch.float32)
            self._sums = tuple(torch.zeros_like(self._k, dtype=dtype) for _ in range(2))
        for total, share in zip(self._sums, (dk, dv), strict=True):
            total[:, :, rows] += share

    def result(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            return torch.zeros_like(self._k), torch.zeros_like(self._k)
        dk, dv = self._sums
        return dk.to(self._k.dtype), dv.to(self._k.dtype)


class _Rows:
    """Which rows already hold a result, and whether some get more than two."""

    def __init__(self, num_rows: int, portions: Sequence[tuple[Tile, ...]]):
        spans = tuple((t.q.start, t.q.stop) for tiles in portions for t in tiles)
        self.many = _depth(spans) > 2
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
