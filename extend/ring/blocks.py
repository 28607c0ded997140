"""Keys and values on the way: K and V in one buffer, rows outermost.

A block is [rows, 2, b, h_kv, d]: any range of rows is one piece of memory, so that a part of it
travels as cheaply as all of it. Kernels read K and V out of it through strides, without a copy.
"""

import torch
from torch import Tensor

from extend.ring.comm import RingComm, Window
from extend.ring.lse import write_sum
from extend.ring.partial import assemble


def block_shape(k: Tensor) -> tuple[int, ...]:
    """The shape of a block that holds k [b, h_kv, rows, d] and its values."""
    batch, num_kv_heads, rows, head_dim = k.shape
    return rows, 2, batch, num_kv_heads, head_dim


def fill_block(block: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k, v [b, h_kv, n, d] into the first n rows of `block`."""
    keys, values = open_block(block[: k.shape[2]])
    write_sum(keys, k)
    write_sum(values, v)


def open_block(block: Tensor) -> tuple[Tensor, Tensor]:
    """Views k, v [b, h_kv, rows, d] of a block."""
    return block[:, 0].permute(1, 2, 0, 3), block[:, 1].permute(1, 2, 0, 3)


def publish_block(
    comm: RingComm, lane: str, like: Tensor, k: Tensor | None, v: Tensor | None
) -> Window:
    """Offer k and v (None: nothing of use) in a block as large as for `like` [b, h_kv, s, d]."""
    write = (lambda block: fill_block(block, k, v)) if k is not None else (lambda block: None)
    return comm.publish(lane, block_shape(like), like, write)


class KeySum:
    """dk and dv [b, h_kv, s, d] of this rank's own keys, from the shares of several ranks.

    Two shares are added in one go, rounding once; more are summed in fp32 as they come.
    """

    def __init__(self, k: Tensor, num_shares: int):
        """`num_shares` is how many ranks, this one included, have a share in the same key."""
        self._k = k
        self._parts: tuple[list, list] | None = ([], []) if num_shares <= 2 else None
        self._sums: tuple[Tensor, Tensor] | None = None
        if self._parts is None:
            wide = torch.promote_types(k.dtype, torch.float32)
            self._sums = tuple(torch.zeros_like(k, dtype=wide) for _ in range(2))

    def add_own(self, dk: Tensor, dv: Tensor, heads: slice | None = None) -> None:
        """Add the share of this rank's own queries, of all key heads or of `heads`; once each."""
        self._add(heads, slice(0, self._k.shape[2]), dk, dv)

    def add_block(self, rows: slice, block: Tensor, heads: slice | None = None) -> None:
        """Add what arrived for `rows`: a block [rows, 2, b, h_kv, d]."""
        self._add(heads, rows, *open_block(block))

    def result(self) -> tuple[Tensor, Tensor]:
        """dk, dv in the dtype of the keys."""
        if self._parts is not None:
            return assemble(self._k, self._parts[0]), assemble(self._k, self._parts[1])
        dk, dv = (total.to(self._k.dtype) for total in self._sums)
        return dk, dv

    def _add(self, heads: slice | None, rows: slice, dk: Tensor, dv: Tensor) -> None:
        heads = heads or slice(0, self._k.shape[1])
        for i, share in enumerate((dk, dv)):
            if self._parts is not None:
                self._parts[i].append((heads, rows, share))
            else:
                part = self._sums[i][:, heads, rows]
                write_sum(part, part, share)


def split_heads(k: Tensor, num_heads: int, fetched: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of the portions of a rank's own part of a backward pass.

    Two halves of k [b, h_kv, s, d]'s heads where many rows are `fetched` from other ranks: half of
    it before the others' keys and half after them hides the first fetch behind the one and the way
    home of the last gradients behind the other. Otherwise that hides less than halves cost.
    """
    num_kv_heads = k.shape[1]
    halve = 4 * fetched >= k.shape[2]
    group, cut = num_heads // num_kv_heads, num_kv_heads // 2 if halve else 0
    cuts = [(0, cut), (cut, num_kv_heads)] if cut else [(0, num_kv_heads)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in cuts]
